//! Datagrams and requests, from right to rubbish, made from the table of messages.

use rdsock_shm::control::{Request, bytes_of, from_bytes, head, kind, request};

use crate::dice::Dice;
use crate::table::{Field, HEAD, MESSAGES, REQUEST, Row, row, size};

/// Connection records that are spoken of most.
const RECORDS: usize = 6;
/// Longest datagram.
const LONGEST: usize = 4096;
/// Where another node's programs would be: see `main.rs`.
const ELSEWHERE: [u8; 4] = [127, 60, 0, 1];

/// What a fuzzer knows, and so can say or use for a lie.
#[derive(Default)]
pub struct Knowledge {
    /// What an honest announcement of one of its sockets says, or of somebody else's.
    pub truth: Option<Request>,
    /// Cookies, streams, tickets and the like that were seen.
    pub words: Vec<u64>,
    pub questions: u64,
}

impl Knowledge {
    const MOST: usize = 64;

    pub fn learn(&mut self, word: u64) {
        if self.words.len() == Self::MOST {
            self.words.remove(0);
        }
        self.words.push(word);
    }

    fn truth(&self) -> Request {
        self.truth
            .unwrap_or_else(|| from_bytes(&[0; size_of::<Request>()]).unwrap())
    }

    /// A body that says nothing wrong, as far as this process knows.
    fn body(&mut self, row: &Row, dice: &mut Dice) -> Vec<u8> {
        let mut body = vec![0; size(row.body)];
        let request = Request {
            what: 1 + dice.below(2) as u32,
            conn: dice.below(RECORDS) as u32,
            generation: dice.below(4) as u32,
            ..self.truth()
        };
        for field in row.body {
            let place = &mut body[field.offset..][..field.size];
            if let Some(same) = REQUEST.iter().find(|other| other.name == field.name)
                && same.size == field.size
            {
                place.copy_from_slice(&bytes_of(&request)[same.offset..][..same.size]);
            } else if field.name == "question" {
                self.questions += 1;
                place.copy_from_slice(&self.questions.to_ne_bytes());
            }
        }
        if row.kind == kind::REACH && dice.once_in(2) {
            let peer = row.body.iter().find(|field| field.name == "peer").unwrap();
            body[peer.offset + 10..][..2].fill(0xff);
            body[peer.offset + 12..][..4].copy_from_slice(&ELSEWHERE);
        }
        body
    }

    /// A datagram, with its row.
    pub fn datagram(&mut self, dice: &mut Dice) -> (&'static Row, Vec<u8>) {
        let row = match dice.below(64) {
            0..=19 => row(kind::KICK).unwrap(),
            20..=33 => row(kind::LOOKUP).unwrap(),
            34..=43 => row(kind::REACH).unwrap(),
            44..=53 => row(kind::WHOIS).unwrap(),
            54 | 55 => row(kind::ADOPT).unwrap(),
            56 if dice.once_in(4) => row(kind::QUERY).unwrap(),
            57 if dice.once_in(4) => row(kind::HELLO).unwrap(),
            58 if dice.once_in(2) => dice.one_of(MESSAGES).unwrap(),
            _ => row(kind::KICK).unwrap(),
        };
        let mut body = self.body(row, dice);
        self.lie(&mut body, row.body, dice);
        let mut bytes = [bytes_of(&head(row.kind)), &body].concat();
        if dice.once_in(64) {
            self.damage(&mut bytes, dice);
        }
        (row, bytes)
    }

    fn lie(&self, bytes: &mut [u8], fields: &[Field], dice: &mut Dice) {
        for _ in 0..[0, 0, 0, 1, 1, 2][dice.below(6)] {
            if let Some(field) = dice.one_of(fields) {
                dice.lie(&mut bytes[field.offset..][..field.size], &self.words);
            }
        }
    }

    /// Breaks the form: head, length, or all.
    fn damage(&self, bytes: &mut Vec<u8>, dice: &mut Dice) {
        match dice.below(8) {
            0 => self.lie(bytes, HEAD, dice),
            1 | 2 => {
                if let Some(field) = dice.one_of(HEAD) {
                    dice.lie(&mut bytes[field.offset..][..field.size], &[]);
                }
            }
            3 => bytes.truncate(dice.below(bytes.len())),
            4 => bytes.resize(bytes.len() + 1 + dice.below(16), 0),
            5 => bytes.resize(bytes.len() + dice.below(LONGEST), 0xff),
            6 => {
                let at = dice.below(bytes.len());
                bytes[at] ^= 1 << dice.below(8);
            }
            _ => {
                bytes.resize(dice.below(300), 0);
                dice.fill(bytes);
            }
        }
    }

    /// A request for the queue.
    pub fn request(&mut self, dice: &mut Dice) -> Request {
        let what = match dice.below(8) {
            0..=2 => request::ANNOUNCE,
            3 => request::CLOSED,
            _ => 1 + dice.below(7) as u32,
        };
        let mut request = Request {
            what,
            conn: dice.below(RECORDS) as u32,
            generation: dice.below(4) as u32,
            ..self.truth()
        };
        if what == request::HOLDS {
            request.stream_id = dice.one_of(&self.words).copied().unwrap_or(0);
        }
        if what == request::LISTENS && dice.once_in(2) {
            (request.conn, request.generation) = (0, 0);
        }
        // Only those that are known for true announcements keep their roles.
        request.extra = dice.once_in(256).into();
        let mut bytes = bytes_of(&request).to_vec();
        self.lie(&mut bytes, REQUEST, dice);
        from_bytes(&bytes).unwrap()
    }
}
