//! Control messages (`cmsg(3)`), written and read as bytes in the kernel's layout:
//! length as `size_t`, level, type, data, all padded to the size of `size_t`.

/// Room for the control messages of one message, in bytes: on receipt traffic
/// class 24, packet info 40, GRO size 24, overrun count 24; less when sending.
pub(crate) const CONTROL_BYTES: usize = 128;

const ALIGN_BYTES: usize = size_of::<usize>();
const HEADER_BYTES: usize = size_of::<usize>() + 8;

const fn padded(len: usize) -> usize {
    len.next_multiple_of(ALIGN_BYTES)
}

/// Appends control messages to a buffer.
#[derive(Debug)]
pub(super) struct ControlWriter<'a> {
    buffer: &'a mut [u8],
    len: usize,
}

impl<'a> ControlWriter<'a> {
    pub(super) fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, len: 0 }
    }

    /// Appends one message.
    ///
    /// # Panics
    /// If the buffer, sized for all that are ever sent, is too small.
    pub(super) fn push(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        let message_bytes = HEADER_BYTES + data.len();
        let end = self.len + padded(message_bytes);
        let space = &mut self.buffer[self.len..end];
        let (header, rest) = space.split_at_mut(HEADER_BYTES);
        header[..ALIGN_BYTES].copy_from_slice(&message_bytes.to_ne_bytes());
        header[ALIGN_BYTES..ALIGN_BYTES + 4].copy_from_slice(&level.to_ne_bytes());
        header[ALIGN_BYTES + 4..].copy_from_slice(&kind.to_ne_bytes());
        rest[..data.len()].copy_from_slice(data);
        rest[data.len()..].fill(0);
        self.len = end;
    }

    /// Bytes written so far.
    pub(super) const fn len(&self) -> usize {
        self.len
    }
}

/// Iterates over received control messages: level, type, data.
#[derive(Debug, Clone)]
pub(crate) struct ControlReader<'a> {
    rest: &'a [u8],
}

impl<'a> ControlReader<'a> {
    /// Reads the control bytes that the kernel filled in.
    pub(crate) const fn new(control: &'a [u8]) -> Self {
        Self { rest: control }
    }
}

impl<'a> Iterator for ControlReader<'a> {
    type Item = (libc::c_int, libc::c_int, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (header, _) = self.rest.split_at_checked(HEADER_BYTES)?;
        let word = |at: usize| {
            i32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes of the header"))
        };
        let message_bytes =
            usize::from_ne_bytes(header[..ALIGN_BYTES].try_into().expect("a size_t"));
        let data = self.rest.get(HEADER_BYTES..message_bytes)?;
        self.rest = self.rest.get(padded(message_bytes)..).unwrap_or_default();
        Some((word(ALIGN_BYTES), word(ALIGN_BYTES + 4), data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut buffer = [0xff_u8; CONTROL_BYTES];
        let mut writer = ControlWriter::new(&mut buffer);
        writer.push(41, 67, &2_i32.to_ne_bytes());
        writer.push(17, 103, &1452_u16.to_ne_bytes());
        writer.push(41, 50, &[9; 20]);
        let len = writer.len();
        assert_eq!(len, 24 + 24 + 40);
        let read: Vec<_> = ControlReader::new(&buffer[..len]).collect();
        assert_eq!(read.len(), 3);
        assert_eq!(read[0], (41, 67, &2_i32.to_ne_bytes()[..]));
        assert_eq!(read[1], (17, 103, &1452_u16.to_ne_bytes()[..]));
        assert_eq!(read[2], (41, 50, &[9_u8; 20][..]));
    }

    #[test]
    fn layout_is_the_c_librarys() {
        for len in [1_u32, 2, 4, 8, 20] {
            assert_eq!(
                padded(HEADER_BYTES + len as usize),
                padded(size_of::<libc::cmsghdr>()) + padded(len as usize)
            );
        }
    }

    #[test]
    fn truncated_and_nonsense_lengths_end_the_walk() {
        let mut buffer = [0_u8; CONTROL_BYTES];
        let mut writer = ControlWriter::new(&mut buffer);
        writer.push(41, 67, &2_i32.to_ne_bytes());
        assert_eq!(ControlReader::new(&[]).count(), 0);
        assert_eq!(ControlReader::new(&buffer[..15]).count(), 0);
        assert_eq!(ControlReader::new(&buffer[..19]).count(), 0);
        buffer[..8].copy_from_slice(&3_usize.to_ne_bytes());
        assert_eq!(ControlReader::new(&buffer[..24]).count(), 0);
        buffer[..8].copy_from_slice(&usize::MAX.to_ne_bytes());
        assert_eq!(ControlReader::new(&buffer[..24]).count(), 0);
    }
}
