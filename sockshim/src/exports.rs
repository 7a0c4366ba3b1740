//! The functions that programs call in place of libc's, by their C names, made from the table (`table.rs`). The dynamic
//! loader finds them first; each is its body and nothing else. Not in unit tests: there libc's own stay.

#![cfg(not(test))]

use crate::{calls, children, handing_over, locked, options, plugins, process, spawn, syscalls};
use libc::*;

macro_rules! exported {
    ($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:path) => {
        /// # Safety
        /// As the C function of this name.
        #[unsafe(no_mangle)]
        #[allow(clippy::unused_unit)]
        unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
            // SAFETY: as the caller says.
            unsafe { $body($($arg),*) }
        }
    };
}

/// A function that goes on in C, with all registers and the stack as they were.
macro_rules! jump {
    ($name:ident => $target:ident) => {
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        extern "C" fn $name() {
            unsafe extern "C" {
                fn $target();
            }
            #[cfg(target_arch = "x86_64")]
            std::arch::naked_asm!("jmp {}", sym $target);
            #[cfg(target_arch = "aarch64")]
            std::arch::naked_asm!("b {}", sym $target);
        }
    };
}

/// A function that calls one of the shim's with the first arguments, and goes on where that says.
macro_rules! go_on {
    ($name:ident => $target:path) => {
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        extern "C" fn $name() {
            #[cfg(target_arch = "x86_64")]
            std::arch::naked_asm!(
                "push rdi", "push rsi", "push rdx",
                "call {}",
                "pop rdx", "pop rsi", "pop rdi",
                "jmp rax",
                sym $target
            );
            #[cfg(target_arch = "aarch64")]
            std::arch::naked_asm!(
                "stp x0, x1, [sp, -32]!", "stp x2, x30, [sp, 16]",
                "bl {}", "mov x16, x0",
                "ldp x2, x30, [sp, 16]", "ldp x0, x1, [sp], 32",
                "br x16",
                sym $target
            );
        }
    };
}

macro_rules! export {
    (
        functions { $(
            $(#[doc = $class:literal])+ $word:ident { $(
                $how:ident fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty
                    = $body:path $(, also $alias:ident)* $(, $(#[$at:meta])* number $number:ident)?;
            )* }
        )* }
        numbers { $($numbers:tt)* }
        variadic { $($variadic:ident => $gathers:ident;)* }
        passed_through { $($passed:ident => $before:path;)* }
        real_alone { $($alone:tt)* }
    ) => {
        $( $(
            exported! { $name($($arg: $ty),*) -> $ret = $body }
            also! { [$($alias)*] ($($arg: $ty),*) -> $ret = $body }
        )* )*
        $( jump! { $variadic => $gathers } )*
        $( go_on! { $passed => $before } )*
    };
}

macro_rules! also {
    ([] $($rest:tt)*) => {};
    ([$alias:ident $($more:ident)*] $($rest:tt)*) => {
        exported! { $alias $($rest)* }
        also! { [$($more)*] $($rest)* }
    };
}

table! { export }
