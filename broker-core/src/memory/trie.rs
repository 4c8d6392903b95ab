//! Which patterns match a topic: one step a segment, whatever the number of patterns.

use std::collections::HashMap;

use crate::{Topic, TopicFilter};

/// Patterns by their segments, with a value each.
pub(super) struct Trie<T> {
    /// What the patterns ending here hold.
    value: Option<T>,
    /// By literal segment, and by `*` and `>`, which no literal can be.
    children: HashMap<Box<str>, Trie<T>>,
}

impl<T> Default for Trie<T> {
    fn default() -> Self {
        Self { value: None, children: HashMap::default() }
    }
}

impl<T> Trie<T> {
    /// Sets the value of `pattern`.
    pub(super) fn insert(&mut self, pattern: &TopicFilter, value: T) {
        let mut node = self;
        for segment in pattern.segments() {
            node = node.children.entry(segment.into()).or_default();
        }
        node.value = Some(value);
    }

    /// Removes `pattern`, and the branches that then lead nowhere.
    pub(super) fn remove(&mut self, pattern: &TopicFilter) {
        fn remove<'a, T>(node: &mut Trie<T>, mut segments: impl Iterator<Item = &'a str>) {
            let Some(segment) = segments.next() else {
                node.value = None;
                return;
            };
            if let Some(child) = node.children.get_mut(segment) {
                remove(child, segments);
                if child.value.is_none() && child.children.is_empty() {
                    node.children.remove(segment);
                }
            }
        }
        remove(self, pattern.segments());
    }

    /// Hands the value of every pattern that matches `topic` to `found`.
    pub(super) fn matches(&self, topic: &Topic, found: &mut impl FnMut(&T))
    where
        T: HasFilter,
    {
        let segments: smallvec::SmallVec<[&str; 8]> = topic.segments().collect();
        self.walk(&segments, topic, found);
    }

    fn walk(&self, segments: &[&str], topic: &Topic, found: &mut impl FnMut(&T))
    where
        T: HasFilter,
    {
        // What the filter itself refuses (a wildcard on the broker's own topics) is refused here.
        let mut check = |node: &Self| {
            if let Some(value) = node.value.as_ref().filter(|value| value.filter().matches(topic)) {
                found(value);
            }
        };
        let Some((first, rest)) = segments.split_first() else {
            check(self);
            return;
        };
        if let Some(node) = self.children.get(">") {
            check(node);
        }
        if let Some(node) = self.children.get("*") {
            node.walk(rest, topic, found);
        }
        if let Some(node) = self.children.get(*first) {
            node.walk(rest, topic, found);
        }
    }
}

/// A value that knows its pattern.
pub(super) trait HasFilter {
    fn filter(&self) -> &TopicFilter;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl HasFilter for TopicFilter {
        fn filter(&self) -> &TopicFilter {
            self
        }
    }

    fn found(trie: &Trie<TopicFilter>, topic: &Topic) -> Vec<String> {
        let mut all = Vec::new();
        trie.matches(topic, &mut |filter: &TopicFilter| all.push(filter.to_string()));
        all.sort();
        all
    }

    proptest! {
        #[test]
        fn finds_what_the_filters_themselves_say(
            filters in proptest::collection::btree_set(r"((a|b|\*)\.){0,3}(a|b|\*|>)", 0..20),
            removed in proptest::collection::vec(any::<bool>(), 20),
            topic in r"((a|b|broker-x)\.){0,3}(a|b)",
        ) {
            let topic = Topic::new(topic).unwrap();
            let filters: Vec<TopicFilter> = filters.iter().map(|filter| TopicFilter::new(filter).unwrap()).collect();
            let mut trie = Trie::default();
            for filter in &filters {
                trie.insert(filter, filter.clone());
            }
            let mut expected = Vec::new();
            for (filter, removed) in filters.iter().zip(removed) {
                if removed {
                    trie.remove(filter);
                } else if filter.matches(&topic) {
                    expected.push(filter.to_string());
                }
            }
            expected.sort();
            prop_assert_eq!(found(&trie, &topic), expected);
        }
    }
}
