//! A message's headers: a multimap in order.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::{Error, Result};

/// The name of a header: case-sensitive UTF-8 of 1 to 255 bytes without control characters.
///
/// ```
/// use broker_core::HeaderName;
///
/// assert_eq!(HeaderName::new("Größe")?.as_str(), "Größe");
/// assert!(HeaderName::new("line\nbreak").is_err());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HeaderName(Arc<str>);

impl HeaderName {
    /// Parses a name.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid), saying what is allowed.
    pub fn new(name: impl AsRef<str>) -> Result<Self> {
        check_text("header name", name.as_ref()).map(Self)
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Text of 1 to 255 bytes without control characters: header names, ids, deduplication keys.
pub(crate) fn check_text(what: &str, text: &str) -> Result<Arc<str>> {
    if text.is_empty() || text.len() > 255 || text.chars().any(char::is_control) {
        let shown: String = text.chars().take(40).collect();
        return Err(Error::invalid(format!(
            "{what} {shown:?}: it has 1 to 255 bytes of UTF-8 without control characters"
        )));
    }
    Ok(text.into())
}

impl fmt::Display for HeaderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HeaderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// Headers in the order they were added; a name may repeat, a value is any bytes.
///
/// ```
/// use broker_core::Headers;
///
/// let mut headers = Headers::new();
/// headers.append("via", "a")?;
/// headers.append("via", "b")?;
/// assert_eq!(headers.get("via").map(|value| &value[..]), Some(&b"a"[..]));
/// assert_eq!(headers.get_all("via").count(), 2);
/// assert!(headers.get("Via").is_none());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(HeaderName, Bytes)>);

impl Headers {
    /// No headers; allocates nothing.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds one more, whatever is there already.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if `name` is no [`HeaderName`].
    pub fn append(&mut self, name: impl AsRef<str>, value: impl Into<Bytes>) -> Result<()> {
        self.push(HeaderName::new(name)?, value.into());
        Ok(())
    }

    /// Adds one more under a name already checked.
    pub fn push(&mut self, name: HeaderName, value: Bytes) {
        self.0.push((name, value));
    }

    /// Replaces every value of `name` with this one.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if `name` is no [`HeaderName`].
    pub fn set(&mut self, name: impl AsRef<str>, value: impl Into<Bytes>) -> Result<()> {
        let name = HeaderName::new(name)?;
        self.remove(name.as_str());
        self.push(name, value.into());
        Ok(())
    }

    /// Removes every value of `name`; tells how many there were.
    pub fn remove(&mut self, name: &str) -> usize {
        let before = self.0.len();
        self.0.retain(|(have, _)| have.as_str() != name);
        before - self.0.len()
    }

    /// Keeps the headers for which `keep` holds.
    pub fn retain(&mut self, mut keep: impl FnMut(&HeaderName, &Bytes) -> bool) {
        self.0.retain(|(name, value)| keep(name, value));
    }

    /// The first value of `name`.
    pub fn get(&self, name: &str) -> Option<&Bytes> {
        self.iter().find(|(have, _)| have.as_str() == name).map(|(_, value)| value)
    }

    /// The first value of `name`, if it is UTF-8.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Every value of `name`, in order.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Bytes> {
        self.iter().filter(move |(have, _)| have.as_str() == name).map(|(_, value)| value)
    }

    /// Every header, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&HeaderName, &Bytes)> {
        self.0.iter().map(|(name, value)| (name, value))
    }

    /// How many there are, repeats counted.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of names and values together.
    pub fn size(&self) -> usize {
        self.0.iter().map(|(name, value)| name.as_str().len() + value.len()).sum()
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}
