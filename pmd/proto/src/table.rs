//! The table of streams: fixed size, generation-tagged ids.

use crate::id::StreamId;
use crate::stream::Stream;

struct Place {
    generation: u32,
    stream: Option<Stream>,
}

/// All streams of a node.
pub(crate) struct Table {
    places: Vec<Place>,
    free: Vec<u32>,
    used: usize,
}

impl Table {
    /// An empty table. Generations begin at `generation`, so that ids given before a restart of
    /// the daemon are not given again.
    pub(crate) fn new(places: u32, generation: u32) -> Self {
        let place = || Place {
            generation: generation.max(1),
            stream: None,
        };
        Table {
            places: (0..places).map(|_| place()).collect(),
            free: (0..places).rev().collect(),
            used: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.used
    }

    pub(crate) fn is_full(&self) -> bool {
        self.used == self.places.len()
    }

    pub(crate) fn insert(&mut self, stream: Stream) -> Option<StreamId> {
        loop {
            let index = self.free.pop()?;
            let place = &mut self.places[index as usize];
            // A place that `restore` took is still in the list.
            if place.stream.is_none() {
                place.stream = Some(stream);
                self.used += 1;
                return Some(StreamId {
                    index,
                    generation: place.generation,
                });
            }
        }
    }

    /// Puts a stream where it was before the daemon restarted; false when the place is taken or
    /// does not exist.
    pub(crate) fn restore(&mut self, id: StreamId, stream: Stream) -> bool {
        match self.places.get_mut(id.at()) {
            Some(place) if place.stream.is_none() => {
                *place = Place {
                    generation: id.generation,
                    stream: Some(stream),
                };
                self.used += 1;
                true
            }
            _ => false,
        }
    }

    pub(crate) fn remove(&mut self, at: usize) {
        let place = &mut self.places[at];
        if place.stream.take().is_some() {
            place.generation = place.generation.checked_add(1).unwrap_or(1);
            self.free.push(at as u32);
            self.used -= 1;
        }
    }

    /// The place of an id that is in use.
    pub(crate) fn find(&self, id: StreamId) -> Option<usize> {
        let place = self.places.get(id.at())?;
        (place.stream.is_some() && place.generation == id.generation).then_some(id.at())
    }

    pub(crate) fn id(&self, at: usize) -> StreamId {
        StreamId {
            index: at as u32,
            generation: self.places[at].generation,
        }
    }
}

/// Places come from `find`, or from a list whose members are in the table.
impl std::ops::Index<usize> for Table {
    type Output = Stream;
    fn index(&self, at: usize) -> &Stream {
        self.places[at].stream.as_ref().expect("a place in use")
    }
}

impl std::ops::IndexMut<usize> for Table {
    fn index_mut(&mut self, at: usize) -> &mut Stream {
        self.places[at].stream.as_mut().expect("a place in use")
    }
}
