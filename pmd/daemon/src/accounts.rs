//! Accounts: what each user has of everything that is finite, and how much a user may have.
//!
//! Whoever makes something for a tenant takes a [`Charge`] first and keeps it beside the thing: what is dropped is
//! given back, so an account can't drift from what is there.
//!
//! There are limits for each user and for all users together. Some things are *shared*: a user may have no more of them
//! than are left for the others. Alone, a user gets half of all; the next one half of the rest, and so on: three greedy
//! users leave a sixteenth to a fourth one. (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory
//! packet switches", 1998, with factor 1.) Users who are not [`Known`] may be one attacker's (`/etc/subuid`): of shared things, all of
//! them together leave a sixteenth to those who are.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::shares::Known;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thing {
    /// Descriptors of the daemon.
    Descriptors,
    /// Control connections that have not said HELLO.
    Callers,
    /// Attached processes.
    Tenants,
    /// Streams, in each state: asked for, carried, promoted.
    Streams,
    /// Bytes of the streams' memory.
    Bytes,
    /// Streams to other nodes, which are among the streams.
    Carried,
    /// Connects to or from other nodes that are under way.
    Connects,
    /// Questions that are being answered.
    Queries,
    /// Bytes of messages that wait for programs which do not read.
    Unread,
    /// Sockets on which attached processes listen, for connections from other nodes.
    Listeners,
    /// Ends of streams that attached processes have inherited.
    Inherited,
    /// Connections that were announced and whose other end was not.
    Waiting,
}

impl Thing {
    /// All of them, in the order of their numbers.
    pub const ALL: [Thing; 12] = [
        Thing::Descriptors,
        Thing::Callers,
        Thing::Tenants,
        Thing::Streams,
        Thing::Bytes,
        Thing::Carried,
        Thing::Connects,
        Thing::Queries,
        Thing::Unread,
        Thing::Listeners,
        Thing::Inherited,
        Thing::Waiting,
    ];

    /// As `rdsock stat` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Thing::Descriptors => "descriptors",
            Thing::Callers => "callers",
            Thing::Tenants => "tenants",
            Thing::Streams => "streams",
            Thing::Bytes => "bytes",
            Thing::Carried => "carried",
            Thing::Connects => "connects",
            Thing::Queries => "queries",
            Thing::Unread => "unread",
            Thing::Listeners => "listeners",
            Thing::Inherited => "inherited",
            Thing::Waiting => "waiting",
        }
    }
}

/// An amount of each [`Thing`].
pub type Amounts = [u64; Thing::ALL.len()];

/// How much may be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// By one user.
    pub user: Amounts,
    /// By all together.
    pub all: Amounts,
    /// Of which things a user may have no more than are left.
    pub shared: [bool; Thing::ALL.len()],
}

impl Limits {
    /// Of one thing alone there are so many, which all users share; of the others, any number.
    pub fn of_shared(thing: Thing, most: u64) -> Self {
        let mut limits = Limits {
            user: [u64::MAX; Thing::ALL.len()],
            all: [u64::MAX; Thing::ALL.len()],
            shared: [false; Thing::ALL.len()],
        };
        for (at, other) in Thing::ALL.into_iter().enumerate() {
            if other == thing {
                (limits.all[at], limits.shared[at]) = (most, true);
            }
        }
        limits
    }
}

/// A limit that is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} of {} {} are in use", if self.of_all { "all" } else { "one user's" }, self.limit, self.thing.name())]
pub struct Over {
    /// Of what.
    pub thing: Thing,
    /// How much may be had.
    pub limit: u64,
    /// By all users together.
    pub of_all: bool,
}

impl Over {
    /// What the log says of whoever is refused.
    pub fn cause(&self) -> &'static str {
        match (self.thing, self.of_all) {
            (Thing::Descriptors, false) => {
                "its user has its share of descriptors (max_descriptors_per_user)"
            }
            (Thing::Descriptors, true) => "the daemon's descriptors are in use (LimitNOFILE=)",
            (Thing::Callers, _) => "too many connections that have not said who they are",
            (Thing::Tenants, false) => "max_tenants_per_user is reached",
            (Thing::Tenants, true) => "max_tenants is reached",
            (Thing::Streams, false) => {
                "max_streams_per_user is reached: streams stay on the kernel"
            }
            (Thing::Bytes, _) => "max_bytes_per_user is reached: streams stay on the kernel",
            (Thing::Carried, false) => {
                "its user has its share of the streams to other nodes: connects stay on the kernel"
            }
            (Thing::Carried, true) => {
                "max_streams of [fabric] is reached: connects stay on the kernel"
            }
            (Thing::Connects, _) => "max_connects_per_user is reached: connects stay on the kernel",
            (Thing::Queries, _) => "max_queries_per_user is reached",
            (Thing::Unread, _) => "max_unread_bytes_per_user is reached",
            (Thing::Listeners, _) => {
                "its user listens on as many sockets as may be: other nodes reach further ones over the kernel"
            }
            (Thing::Inherited, _) => {
                "its user's programs have inherited as many streams as may be (4 times max_streams_per_user)"
            }
            (Thing::Waiting, _) => {
                "its user has its share of the connections whose other end is waited for: further ones stay on the kernel"
            }
            (Thing::Streams, true) => "too many streams: they stay on the kernel",
        }
    }
}

#[derive(Debug, Default)]
struct Sums([AtomicU64; Thing::ALL.len()]);

impl Sums {
    /// Adds, unless that leads beyond `most`.
    fn take(&self, thing: Thing, amount: u64, most: u64) -> bool {
        let Some(sum) = self.0.get(thing as usize) else {
            return false;
        };
        let more = |has: u64| has.checked_add(amount).filter(|sum| *sum <= most);
        let taken = sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.is_ok()
    }

    fn give(&self, thing: Thing, amount: u64) {
        if let Some(sum) = self.0.get(thing as usize) {
            sum.fetch_sub(amount, Ordering::Relaxed);
        }
    }

    fn get(&self, thing: Thing) -> u64 {
        let sum = self.0.get(thing as usize);
        sum.map_or(0, |sum| sum.load(Ordering::Relaxed))
    }
}

#[derive(Debug)]
struct Account {
    has: Sums,
    /// How often a limit was in the way.
    refused: Sums,
}

/// A part of a user's account, until it is dropped.
#[derive(Debug)]
pub struct Charge {
    account: Arc<Account>,
    /// Of all users who are not known, where this is one of these.
    crowd: Option<Arc<Sums>>,
    all: Arc<Sums>,
    limits: Arc<Limits>,
    amounts: Amounts,
}

impl Charge {
    /// Takes more. Nothing is taken when a limit is in the way.
    pub fn more(&mut self, thing: Thing, amount: u64) -> Result<(), Over> {
        let at = thing as usize;
        let most = |limits: &Amounts| limits.get(at).copied().unwrap_or(0);
        let (of_user, of_all) = (most(&self.limits.user), most(&self.limits.all));
        let over = |limit, of_all| {
            self.account.refused.take(thing, 1, u64::MAX);
            Err(Over {
                thing,
                limit,
                of_all,
            })
        };
        if !self.account.has.take(thing, amount, of_user) {
            return over(of_user, false);
        }
        if !self.all.take(thing, amount, of_all) {
            self.account.has.give(thing, amount);
            return over(of_all, true);
        }
        let left = of_all.saturating_sub(self.all.get(thing));
        let shared = self.limits.shared.get(at).is_some_and(|shared| *shared);
        let of_crowd = of_all - of_all / PART_OF_KNOWN;
        let crowd = self.crowd.as_ref();
        let is_crowded = crowd.is_some_and(|crowd| crowd.get(thing) + amount > of_crowd);
        if shared && (is_crowded || self.account.has.get(thing) > left) {
            self.account.has.give(thing, amount);
            self.all.give(thing, amount);
            return over(of_all / 2, false);
        }
        if let Some(crowd) = &self.crowd {
            crowd.take(thing, amount, u64::MAX);
        }
        if let Some(sum) = self.amounts.get_mut(at) {
            *sum += amount;
        }
        Ok(())
    }

    /// Gives some back; no more than was taken.
    pub fn less(&mut self, thing: Thing, amount: u64) {
        if let Some(sum) = self.amounts.get_mut(thing as usize) {
            let amount = amount.min(*sum);
            *sum -= amount;
            self.give_back(thing, amount);
        }
    }

    fn give_back(&self, thing: Thing, amount: u64) {
        let crowd = self.crowd.as_deref();
        for sums in [&self.account.has, &*self.all].into_iter().chain(crowd) {
            sums.give(thing, amount);
        }
    }
}

impl Charge {
    /// Gives back all but this much of one thing.
    pub fn keep_only(&mut self, thing: Thing, amount: u64) {
        for (other, sum) in Thing::ALL.into_iter().zip(self.amounts) {
            let kept = if other == thing { amount } else { 0 };
            self.less(other, sum.saturating_sub(kept));
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        for (thing, amount) in Thing::ALL.into_iter().zip(self.amounts) {
            self.give_back(thing, amount);
        }
    }
}

/// What a user has, and how often a limit was in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statement {
    /// The user.
    pub uid: u32,
    /// What the user has.
    pub has: Amounts,
    /// Refusals.
    pub refused: Amounts,
}

/// The accounts of all users. See the module's text.
#[derive(Debug)]
pub struct Accounts {
    limits: Arc<Limits>,
    users: HashMap<u32, Arc<Account>>,
    /// Accounts without anything in them are looked for when there are so many.
    most: usize,
    known: Known,
    crowd: Arc<Sums>,
    all: Arc<Sums>,
}

/// This part of what is shared is for users who are known.
const PART_OF_KNOWN: u64 = 16;
/// So many accounts are remembered in any case.
const REMEMBERED: usize = 4096;

impl Accounts {
    /// Nobody has anything.
    pub fn new(limits: Limits, known: Known) -> Self {
        Accounts {
            limits: Arc::new(limits),
            users: HashMap::new(),
            most: REMEMBERED,
            known,
            crowd: Arc::default(),
            all: Arc::default(),
        }
    }

    /// From now on these limits count. What is had already stays.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = Arc::new(limits);
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes all of `wanted` for a user, or nothing.
    pub fn charge(&mut self, uid: u32, wanted: &[(Thing, u64)]) -> Result<Charge, Over> {
        if self.users.len() >= self.most {
            self.users
                .retain(|_, account| Arc::strong_count(account) > 1);
            // So that not all are looked at each time, where many have something.
            self.most = REMEMBERED.max(2 * self.users.len());
        }
        let account = self.users.entry(uid).or_insert_with(|| {
            Arc::new(Account {
                has: Sums::default(),
                refused: Sums::default(),
            })
        });
        let mut charge = Charge {
            account: account.clone(),
            crowd: (!self.known.has(uid)).then(|| self.crowd.clone()),
            all: self.all.clone(),
            limits: self.limits.clone(),
            amounts: [0; Thing::ALL.len()],
        };
        for (thing, amount) in wanted {
            charge.more(*thing, *amount)?;
        }
        Ok(charge)
    }

    /// What a user has of something.
    pub fn of(&self, uid: u32, thing: Thing) -> u64 {
        let account = self.users.get(&uid);
        account.map_or(0, |account| account.has.get(thing))
    }

    /// What all users have of something.
    pub fn of_all(&self, thing: Thing) -> u64 {
        self.all.get(thing)
    }

    /// All users that have something, or were refused something.
    pub fn statements(&self) -> impl Iterator<Item = Statement> {
        let statement = |(uid, account): (&u32, &Arc<Account>)| Statement {
            uid: *uid,
            has: Thing::ALL.map(|thing| account.has.get(thing)),
            refused: Thing::ALL.map(|thing| account.refused.get(thing)),
        };
        let something = |statement: &Statement| {
            let mut sums = statement.has.iter().chain(&statement.refused);
            sums.any(|sum| *sum != 0)
        };
        self.users.iter().map(statement).filter(something)
    }
}

/// What tests pay with.
#[cfg(test)]
impl Charge {
    /// Nothing, on an account without limits.
    pub(crate) fn of_nothing() -> Self {
        let most = [u64::MAX; Thing::ALL.len()];
        let limits = Limits {
            user: most,
            all: most,
            shared: [false; Thing::ALL.len()],
        };
        Accounts::new(limits, Known::default())
            .charge(0, &[])
            .unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(user: u64, all: u64) -> Limits {
        Limits {
            user: [user; Thing::ALL.len()],
            all: [all; Thing::ALL.len()],
            shared: [false; Thing::ALL.len()],
        }
    }

    #[test]
    fn what_is_dropped_is_given_back() {
        let mut accounts = Accounts::new(limits(3, 5), Known::default());
        let first = accounts.charge(7, &[(Thing::Streams, 2)]).unwrap();
        let over = accounts.charge(7, &[(Thing::Streams, 2)]).unwrap_err();
        let expected = Over {
            thing: Thing::Streams,
            limit: 3,
            of_all: false,
        };
        assert_eq!(over, expected);
        let other = accounts.charge(8, &[(Thing::Streams, 3)]).unwrap();
        assert!(
            accounts
                .charge(9, &[(Thing::Streams, 1)])
                .unwrap_err()
                .of_all
        );
        drop((first, other));
        assert_eq!(accounts.of_all(Thing::Streams), 0);
        let refused: Vec<u32> = accounts.statements().map(|one| one.uid).collect();
        assert_eq!(refused.len(), 2, "{refused:?}");
    }

    #[test]
    fn a_charge_is_whole_or_nothing() {
        let mut accounts = Accounts::new(limits(3, 100), Known::default());
        let wanted = [(Thing::Descriptors, 3), (Thing::Streams, 4)];
        assert_eq!(
            accounts.charge(7, &wanted).unwrap_err().thing,
            Thing::Streams
        );
        assert_eq!(accounts.of(7, Thing::Descriptors), 0);
    }

    #[test]
    fn three_greedy_users_leave_a_fourth_one_its_share() {
        let limits = Limits {
            shared: [true; Thing::ALL.len()],
            ..limits(u64::MAX, 160)
        };
        let mut accounts = Accounts::new(limits, Known::default());
        let mut taken = Vec::new();
        for (user, share) in [(0, 80), (1, 40), (2, 20)] {
            while let Ok(charge) = accounts.charge(user, &[(Thing::Descriptors, 1)]) {
                taken.push(charge);
            }
            assert_eq!(accounts.of(user, Thing::Descriptors), share);
        }
        assert!(accounts.charge(3, &[(Thing::Descriptors, 10)]).is_ok());
        // What the others give back is there for who is left.
        taken.clear();
        assert!(accounts.charge(3, &[(Thing::Descriptors, 80)]).is_ok());
    }

    #[test]
    fn very_many_users_leave_something_to_those_who_are_known() {
        let limits = Limits {
            shared: [true; Thing::ALL.len()],
            ..limits(u64::MAX, 160)
        };
        let mut accounts = Accounts::new(limits, [7].into_iter().collect());
        let one = [(Thing::Callers, 1)];
        let mut crowd: Vec<_> = (100..400)
            .flat_map(|uid| accounts.charge(uid, &one))
            .collect();
        assert_eq!(crowd.len(), 150);
        assert!(accounts.charge(7, &[(Thing::Callers, 5)]).is_ok());
        crowd.pop();
        assert!(accounts.charge(500, &one).is_ok());
        drop(crowd);
        assert!(accounts.charge(500, &[(Thing::Callers, 80)]).is_ok());
    }

    #[test]
    fn accounts_that_are_empty_are_forgotten() {
        let mut accounts = Accounts::new(limits(3, u64::MAX), Known::default());
        let one = [(Thing::Callers, 1)];
        let users = 0..2 * REMEMBERED as u32;
        let kept: Vec<_> = users.map(|uid| accounts.charge(uid, &one)).collect();
        drop(kept);
        for uid in 0..4 * REMEMBERED as u32 {
            let _ = accounts.charge(uid, &one);
        }
        assert!(accounts.users.len() <= 2 * REMEMBERED);
    }

    proptest! {
        #[test]
        fn sums_are_those_of_the_charges(steps in prop::collection::vec((0u32..4, 0usize..Thing::ALL.len(), 1u64..5, any::<bool>()), 1..200)) {
            let mut accounts = Accounts::new(limits(20, 50), Known::default());
            let mut charges: Vec<(u32, Charge)> = Vec::new();
            for (uid, thing, amount, drops) in steps {
                if drops && !charges.is_empty() {
                    charges.swap_remove(thing % charges.len());
                } else if let Ok(charge) = accounts.charge(uid, &[(Thing::ALL[thing], amount)]) {
                    charges.push((uid, charge));
                }
                for thing in Thing::ALL {
                    let sum = |of: Option<u32>| -> u64 {
                        let own = charges.iter().filter(|(uid, _)| of.is_none_or(|of| of == *uid));
                        own.map(|(_, charge)| charge.amounts[thing as usize]).sum()
                    };
                    prop_assert_eq!(accounts.of_all(thing), sum(None));
                    prop_assert!(sum(None) <= 50);
                    for uid in 0..4 {
                        prop_assert_eq!(accounts.of(uid, thing), sum(Some(uid)));
                        prop_assert!(sum(Some(uid)) <= 20);
                    }
                }
            }
        }
    }
}
