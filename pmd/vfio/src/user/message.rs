//! The messages of the protocol vfio-user, version 0.1: a header of 16 bytes and a body, in the byte order of
//! the machine, over a stream socket. Structures are named, and numbered, as the protocol has them.

/// Major version.
pub const MAJOR: u16 = 0;
/// Minor version.
pub const MINOR: u16 = 1;

/// Commands.
pub mod command {
    #![allow(missing_docs)]
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DEVICE_RESET: u16 = 13;
}

/// Bits of a header's flags.
pub mod flag {
    #![allow(missing_docs)]
    /// Bits 3:0: 0 command, 1 reply.
    pub const TYPE: u32 = 0xf;
    pub const REPLY: u32 = 1;
    pub const NO_REPLY: u32 = 1 << 4;
    pub const ERROR: u32 = 1 << 5;
}

/// Bits of DMA_MAP's flags.
pub mod dma {
    #![allow(missing_docs)]
    pub const READ: u32 = 1;
    pub const WRITE: u32 = 2;
    /// Of DMA_UNMAP.
    pub const UNMAP_ALL: u32 = 1 << 1;
}

/// A structure of the protocol: its bytes, and back.
macro_rules! body {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[allow(missing_docs)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name { $(pub $field: $type),* }

        impl $name {
            /// Bytes of it.
            pub const LEN: usize = 0 $(+ size_of::<$type>())*;

            /// As it is sent.
            pub fn bytes(&self) -> [u8; Self::LEN] {
                let mut bytes = [0; Self::LEN];
                let mut rest = &mut bytes[..];
                $(
                    let (field, after) = rest.split_at_mut(size_of::<$type>());
                    field.copy_from_slice(&self.$field.to_ne_bytes());
                    rest = after;
                )*
                let _ = rest;
                bytes
            }

            /// Takes it from the front of `bytes`; and what follows. `None` when they are too few.
            pub fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
                let mut read = Self::default();
                $(
                    let (field, bytes) = bytes.split_first_chunk()?;
                    read.$field = <$type>::from_ne_bytes(*field);
                )*
                Some((read, bytes))
            }
        }
    };
}

body! {
    /// What each message begins with. `size` counts it too.
    Header { id: u16, command: u16, size: u32, flags: u32, error: u32 }
}
body! {
    /// VERSION; capabilities follow as JSON, ended by a zero.
    Version { major: u16, minor: u16 }
}
body! {
    /// DMA_MAP.
    DmaMap { argsz: u32, flags: u32, offset: u64, address: u64, size: u64 }
}
body! {
    /// DMA_UNMAP.
    DmaUnmap { argsz: u32, flags: u32, address: u64, size: u64 }
}
body! {
    /// DEVICE_GET_INFO.
    DeviceInfo { argsz: u32, flags: u32, regions: u32, irqs: u32 }
}
body! {
    /// DEVICE_GET_REGION_INFO; capabilities follow, as VFIO has them.
    RegionInfo { argsz: u32, flags: u32, index: u32, cap_offset: u32, size: u64, offset: u64 }
}
body! {
    /// DEVICE_GET_IRQ_INFO.
    IrqInfo { argsz: u32, flags: u32, index: u32, count: u32 }
}
body! {
    /// DEVICE_SET_IRQS.
    SetIrqs { argsz: u32, flags: u32, index: u32, start: u32, count: u32 }
}
body! {
    /// REGION_READ and REGION_WRITE; data follow.
    RegionAccess { offset: u64, region: u32, count: u32 }
}

const _: () = assert!(Header::LEN == 16 && DmaMap::LEN == 32 && RegionInfo::LEN == 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_its_fields_one_after_the_other() {
        let access = RegionAccess {
            offset: 0x0102_0304_0506_0708,
            region: 9,
            count: 10,
        };
        let mut bytes = access.bytes().to_vec();
        assert_eq!(bytes[..8], 0x0102_0304_0506_0708u64.to_ne_bytes());
        assert_eq!((bytes[8], bytes[12], bytes.len()), (9, 10, 16));
        bytes.push(77);
        assert_eq!(RegionAccess::split(&bytes), Some((access, &[77u8][..])));
        assert_eq!(RegionAccess::split(&bytes[..15]), None);
    }
}
