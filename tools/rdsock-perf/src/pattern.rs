//! What the bytes of a stream are: a function of their position, so that a receiver can check them.
//!
//! The byte at position `p` is `p mod 251`. It is never [`END`], which therefore can mark the last byte of a stream.

/// The last byte of the last message of a stream.
pub const END: u8 = 0xff;

/// The pattern repeats after so many bytes; a prime, so that a shift by a page or a line shows.
const PERIOD: usize = 251;

/// Bytes of the pattern, from which a message at any position can be taken without copying.
pub struct Pattern {
    bytes: Vec<u8>,
    message: usize,
}

impl Pattern {
    /// A pattern for messages of at most `message` bytes.
    pub fn new(message: usize) -> Self {
        Self {
            bytes: (0..message + PERIOD)
                .map(|position| (position % PERIOD) as u8)
                .collect(),
            message,
        }
    }

    /// The first `len` bytes (at most the message size) of the stream from `position` on.
    #[inline]
    pub fn at(&self, position: u64, len: usize) -> &[u8] {
        let start = (position % PERIOD as u64) as usize;
        &self.bytes[start..start + len]
    }

    /// The final message of a stream: as at `position`, with [`END`] at its end.
    pub fn last(&self, position: u64) -> Vec<u8> {
        let mut message = self.at(position, self.message).to_vec();
        if let Some(last) = message.last_mut() {
            *last = END;
        }
        message
    }

    /// How many of `received` bytes, which started at `position`, are wrong. A final [`END`] is right.
    pub fn wrong(&self, position: u64, received: &[u8]) -> u64 {
        let body = match received.split_last() {
            Some((&END, body)) => body,
            _ => received,
        };
        let mut at = position;
        let mut wrong = 0;
        for piece in body.chunks(self.message) {
            let expected = self.at(at, piece.len());
            if piece != expected {
                wrong += piece
                    .iter()
                    .zip(expected)
                    .filter(|(got, want)| got != want)
                    .count() as u64;
            }
            at += piece.len() as u64;
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_stream_has_no_wrong_byte_however_it_is_cut() {
        let pattern = Pattern::new(64);
        let mut stream: Vec<u8> = Vec::new();
        for message in 0..20 {
            stream.extend_from_slice(pattern.at(message * 64, 64));
        }
        stream.extend(pattern.last(20 * 64));
        assert_eq!(stream.last(), Some(&END));
        for cut in [1, 7, 64, 300, 1000] {
            let mut position = 0;
            for piece in stream.chunks(cut) {
                assert_eq!(pattern.wrong(position, piece), 0);
                position += piece.len() as u64;
            }
        }
    }

    #[test]
    fn a_lost_doubled_or_changed_byte_shows() {
        let pattern = Pattern::new(1024);
        let mut received = pattern.at(0, 1000).to_vec();
        received[10] ^= 1;
        assert_eq!(pattern.wrong(0, &received), 1);
        assert!(pattern.wrong(0, pattern.at(1, 1000)) > 900);
        assert!(pattern.wrong(1, pattern.at(0, 1000)) > 900);
    }

    #[test]
    fn the_pattern_never_holds_the_end_mark() {
        assert!(!Pattern::new(4096).bytes.contains(&END));
    }
}
