//! What strangers have in their hands as well: what they have made, and what they were given.
//!
//! Whoever lets go of such a thing last may have to wait for its owner, and wakes all who watch it, in its own time: five million, where
//! somebody likes that. So whoever drops one lets go of nothing: a porter of its owner's does, and until that is done the
//! thing is on its account.

use std::any::Any;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Arc;

use super::{Owner, Porters};
use crate::accounts::Charge;

/// What is held for as long as a thing.
pub type Beside = Arc<dyn Any + Send + Sync>;

/// Who lets go of things, and on whose behalf.
#[derive(Debug)]
pub struct Closer<D: Send + 'static> {
    owner: Owner,
    porters: Porters<D>,
}

impl<D: Send + 'static> Clone for Closer<D> {
    fn clone(&self) -> Self {
        Closer {
            owner: self.owner,
            porters: self.porters.clone(),
        }
    }
}

impl<D: Send + 'static> Closer<D> {
    pub(super) fn new(owner: Owner, porters: Porters<D>) -> Self {
        Closer { owner, porters }
    }

    /// Something that a stranger has, or is to be given.
    pub fn foreign<T: Send + 'static>(&self, thing: T) -> Foreign<D, T> {
        Foreign {
            thing: ManuallyDrop::new(thing),
            closer: self.clone(),
            charge: None,
            beside: None,
        }
    }
}

/// See the module's text. A descriptor, as a rule.
#[derive(Debug)]
pub struct Foreign<D: Send + 'static, T: Send + 'static = OwnedFd> {
    thing: ManuallyDrop<T>,
    closer: Closer<D>,
    charge: Option<Arc<Charge>>,
    beside: Option<Beside>,
}

impl<D: Send + 'static, T: Send + 'static> Foreign<D, T> {
    /// On whose behalf it is let go of.
    pub fn owner(&self) -> Owner {
        self.closer.owner
    }

    /// Who lets go of it.
    pub fn closer(&self) -> &Closer<D> {
        &self.closer
    }

    /// It is let go of on behalf of somebody else.
    pub fn give_to(&mut self, owner: Owner) {
        self.closer.owner = owner;
    }

    /// It counts on this account until it is let go of; on no other one any more.
    pub fn charge_to(&mut self, charge: impl Into<Arc<Charge>>) {
        self.charge = Some(charge.into());
    }

    /// The same, from the beginning.
    #[must_use]
    pub fn paid_by(mut self, charge: impl Into<Arc<Charge>>) -> Self {
        self.charge_to(charge);
        self
    }

    /// Somebody else lets go of it, and pays for it.
    pub fn hand_over(self) -> T {
        let mut whole = ManuallyDrop::new(self);
        (whole.charge, whole.beside) = (None, None);
        // SAFETY: both are taken once, since nobody drops `whole` or looks at it again.
        unsafe {
            ptr::drop_in_place(&raw mut whole.closer);
            ManuallyDrop::take(&mut whole.thing)
        }
    }

    /// Something is there for as long, paid for elsewhere.
    #[must_use]
    pub fn with(mut self, beside: Beside) -> Self {
        self.beside = Some(beside);
        self
    }
}

impl<D: Send + 'static, T: Send + 'static> Deref for Foreign<D, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.thing
    }
}

impl<D: Send + 'static, T: Send + 'static> DerefMut for Foreign<D, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.thing
    }
}

impl<D: Send + 'static> AsFd for Foreign<D> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.thing.as_fd()
    }
}

impl<D: Send + 'static> AsRawFd for Foreign<D> {
    fn as_raw_fd(&self) -> RawFd {
        self.thing.as_raw_fd()
    }
}

impl<D: Send + 'static, T: Send + 'static> Drop for Foreign<D, T> {
    fn drop(&mut self) {
        // SAFETY: this is its end, and nobody looks at it again.
        let thing = unsafe { ManuallyDrop::take(&mut self.thing) };
        // In this order: what it costs goes behind it.
        let all = (thing, self.beside.take(), self.charge.take());
        self.closer.porters.let_go(self.closer.owner, all);
    }
}
