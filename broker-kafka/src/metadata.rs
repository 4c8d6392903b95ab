//! What was committed beside offsets, read as it is.
//!
//! It is anybody's to write, and rdkafka panics at what is not UTF-8.

#![allow(unsafe_code, reason = "rdkafka has no way to it but one that panics; each use says why it is sound")]

use std::slice;

use rdkafka::TopicPartitionList;

/// The metadata of each element, in order; what is not UTF-8 is replaced.
pub(crate) fn metadata(list: &TopicPartitionList) -> Vec<String> {
    let mut all = Vec::with_capacity(list.count());
    for index in 0..list.count() {
        // SAFETY: the list is borrowed, so that it lives and nobody changes it; it has `count` elements one after
        // another.
        let element = unsafe { &*(*list.ptr()).elems.add(index) };
        let bytes: &[u8] = if element.metadata.is_null() {
            &[]
        } else {
            // SAFETY: not null, it is that many bytes of the element's own.
            unsafe { slice::from_raw_parts(element.metadata.cast(), element.metadata_size) }
        };
        all.push(String::from_utf8_lossy(bytes).into_owned());
    }
    all
}

#[cfg(test)]
mod tests {
    use rdkafka::Offset;

    use super::*;

    #[test]
    fn what_is_no_text_is_read_all_the_same() {
        let mut list = TopicPartitionList::new();
        for (number, text) in ["{}", "abc", ""].into_iter().enumerate() {
            let mut element = list.add_partition("orders", number as i32);
            element.set_offset(Offset::Offset(7)).expect("an offset");
            element.set_metadata(text);
        }
        list.add_partition("orders", 3);
        // SAFETY: the second element has three bytes of metadata, and nobody else looks at them.
        unsafe { (*(*list.ptr()).elems.add(1)).metadata.cast::<u8>().write(0xff) };
        assert_eq!(metadata(&list), ["{}", "\u{fffd}bc", "", ""]);
        let read = crate::group::read(&list).expect("a list without errors");
        let watermarks: Vec<_> =
            read.iter().map(|one| one.progress.as_ref().map(|progress| progress.watermark)).collect();
        assert_eq!(watermarks, [Some(7), Some(7), Some(7), None]);
    }
}
