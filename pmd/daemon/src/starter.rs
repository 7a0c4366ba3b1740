//! A thread that starts threads.
//!
//! To start a thread maps its stack, which waits while another thread changes the process's mappings, and that may wait
//! for strangers: whoever unmaps a file that others have mapped very often. So the control thread, on which all wait, starts none: it
//! orders one here. Porters and the relay call this.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// Orders that there is room for from the beginning.
const ROOM: usize = 64;

type Work = Box<dyn FnOnce() + Send>;

/// A thread that is to be started.
struct Order {
    name: &'static str,
    work: Work,
    failed: Work,
}

#[derive(Default)]
struct Orders {
    list: Mutex<VecDeque<Order>>,
    come: Condvar,
}

/// See the module's text.
#[derive(Clone)]
pub struct Starter {
    orders: Arc<Orders>,
}

impl std::fmt::Debug for Starter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Starter").finish_non_exhaustive()
    }
}

impl Starter {
    /// Starts it. It ends with the process.
    pub fn new() -> io::Result<Self> {
        let orders = Arc::new(Orders::default());
        orders.lock().reserve(ROOM);
        let own = orders.clone();
        let starter = thread::Builder::new().name("starter".into());
        starter.spawn(move || own.carry_out())?;
        Ok(Starter { orders })
    }

    /// One that is held up for ever.
    #[cfg(test)]
    pub fn held_up() -> Self {
        let orders = Arc::default();
        Starter { orders }
    }

    /// Threads that are to be started.
    #[cfg(test)]
    pub fn ordered(&self) -> usize {
        self.orders.lock().len()
    }

    /// Has a thread started, some time; `failed` is called where there can be none now. Waits for nobody.
    pub fn order(
        &self,
        name: &'static str,
        work: impl FnOnce() + Send + 'static,
        failed: impl FnOnce() + Send + 'static,
    ) {
        let order = Order {
            name,
            work: Box::new(work),
            failed: Box::new(failed),
        };
        self.orders.lock().push_back(order);
        self.orders.come.notify_one();
    }
}

impl Orders {
    /// Never held while a thread is started.
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Order>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self) -> ! {
        loop {
            let mut list = self.lock();
            let Order { name, work, failed } = loop {
                match list.pop_front() {
                    Some(order) => break order,
                    None => {
                        let woken = self.come.wait(list);
                        list = woken.unwrap_or_else(PoisonError::into_inner);
                    }
                }
            };
            drop(list);
            if thread::Builder::new()
                .name(name.into())
                .spawn(work)
                .is_err()
            {
                failed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn what_is_ordered_is_started_by_another_thread() {
        let starter = Starter::new().unwrap();
        let (say, hear) = channel();
        for number in 0..3 {
            let say = say.clone();
            let name = move || thread::current().name().map(str::to_owned);
            starter.order("worker", move || say.send((number, name())).unwrap(), || {});
        }
        let patience = Duration::from_secs(60);
        let mut heard: Vec<_> = (0..3)
            .map(|_| hear.recv_timeout(patience).unwrap())
            .collect();
        heard.sort();
        let worker = || Some("worker".to_owned());
        assert_eq!(heard, [(0, worker()), (1, worker()), (2, worker())]);
    }
}
