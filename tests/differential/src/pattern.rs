//! The bytes that travel: each depends on its place in its direction of its connection, so that one that is lost, comes
//! twice or comes to somebody else is seen.

/// A direction of a connection: the connection's number and the side that sends (0 or 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direction {
    /// The connection.
    pub conn: usize,
    /// The side that sends.
    pub from: usize,
}

impl Direction {
    /// The byte at a place.
    pub fn byte(self, at: u64) -> u8 {
        let key = (self.conn as u64 * 2 + self.from as u64) * 0x51;
        (at ^ ((at >> 7) * 0x2D) ^ ((at >> 15) * 0x9D)).wrapping_add(key) as u8
    }

    /// The bytes from a place on.
    pub fn fill(self, at: u64, bytes: &mut [u8]) {
        for (place, byte) in (at..).zip(bytes) {
            *byte = self.byte(place);
        }
    }

    /// Says which byte is wrong, if one is.
    pub fn fault(self, at: u64, bytes: &[u8]) -> Option<String> {
        let wrong = (at..)
            .zip(bytes)
            .find(|(place, byte)| self.byte(*place) != **byte);
        wrong.map(|(place, byte)| {
            let right = self.byte(place);
            format!(" WRONG: byte {place} of its direction is {byte}, not {right}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shifted_byte_is_seen() {
        let direction = Direction { conn: 3, from: 1 };
        let mut bytes = [0; 4096];
        direction.fill(70_000, &mut bytes);
        assert_eq!(direction.fault(70_000, &bytes), None);
        assert!(direction.fault(70_001, &bytes).is_some());
        assert!(
            Direction { conn: 3, from: 0 }
                .fault(70_000, &bytes)
                .is_some()
        );
        assert!(direction.fault(70_000 + 65_536, &bytes).is_some());
    }
}
