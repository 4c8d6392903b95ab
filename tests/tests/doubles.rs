//! The proof of the suite: every double is caught by the checks that it names, each saying what is wrong,
//! and every check is caught failing by at least one double.

use std::collections::BTreeSet;

use broker_tests::doubles::{doubles, right};
use broker_tests::{CHECKS, Report};
use futures_util::StreamExt;
use futures_util::stream;

/// Without a defect the same machinery must pass: else a double is caught for the wrong reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_double_passes() {
    for suite in right() {
        let reports = suite.parallel(8).run(|_| {}).await;
        let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
        assert!(bad.is_empty(), "{}", bad.join("\n"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_double_is_caught_by_every_check_that_names_it() {
    let runs = doubles().map(|double| async move { (double, double.suite().run(|_| {}).await) });
    let mut runs = stream::iter(runs).buffered(24);
    let mut survivors = Vec::new();
    let (mut count, mut catches) = (0, 0);
    while let Some((double, reports)) = runs.next().await {
        assert_eq!(reports.len(), double.caught_by.len(), "{double:?} names a check twice, or one that is none");
        count += 1;
        for report in reports {
            println!("{report}");
            let words =
                double.caught_by.iter().find(|(check, _)| *check == report.check).map_or("", |(_, words)| words);
            let caught = report.is_failure() && report.to_string().contains(words);
            catches += usize::from(caught);
            if !caught {
                survivors.push(format!("{:?} was to be caught by {words:?}: {report}", double.name));
            }
        }
    }
    println!("{count} doubles, {catches} catches, {} survived", survivors.len());
    assert!(survivors.is_empty(), "{}", survivors.join("\n"));
}

#[test]
fn every_check_is_proven_by_a_double() {
    let proven: BTreeSet<&str> = doubles().flat_map(|double| double.caught_by).map(|(check, _)| *check).collect();
    let unproven: Vec<&str> = CHECKS.iter().map(|check| check.id).filter(|id| !proven.contains(id)).collect();
    assert!(unproven.is_empty(), "no double proves {unproven:?}");
}
