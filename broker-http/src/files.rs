//! Files that an operator names: read whole, and only where that ends.

use std::fs::File;
use std::io::{Error, ErrorKind, Read as _, Result};
use std::path::Path;

/// Bytes of a file that is read whole: configurations and certificates have a thousandth of it.
const MAX_BYTES: u64 = 16 << 20;

/// The bytes of a regular file. Opening a named pipe waits for its writer, and reading a device may have no end: a daemon
/// that reads its files again would hear nothing any more.
///
/// # Errors
///
/// That it is no regular file, is larger than any that is meant, or cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let invalid = |why: String| Error::new(ErrorKind::InvalidInput, why);
    // Before it is opened: that is what waits.
    if !std::fs::metadata(path)?.is_file() {
        return Err(invalid("it is no regular file, and only such are read".to_owned()));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(invalid(format!("it has more than {} MiB", MAX_BYTES >> 20)));
    }
    Ok(bytes)
}

/// The same of a text.
///
/// # Errors
///
/// As [`read`], or that it is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?).map_err(|_| Error::new(ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_or_too_large_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::NotFound);
        std::fs::write(&path, "ä").unwrap();
        assert_eq!(read_text(&path).unwrap(), "ä");
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read_text(&path).unwrap_err().to_string().contains("UTF-8"));
        File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("16 MiB"));
        assert!(read(folder.path()).unwrap_err().to_string().contains("no regular file"));
    }
}
