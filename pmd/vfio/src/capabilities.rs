//! Chains of capabilities behind a structure of VFIO (`linux/vfio.h`, `vfio_info_cap_header`), as bytes: id, version
//! and the offset of the next one, from the start of the structure. Read with no trust in who wrote them.

/// An area of a region that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub offset: u64,
    pub size: u64,
}

/// VFIO_REGION_INFO_CAP_SPARSE_MMAP.
const SPARSE_MMAP: u16 = 1;
/// Most areas of a region that make sense, and most capabilities.
const MOST: usize = 256;

/// A chain that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its capabilities are malformed")]
pub(crate) struct Malformed;

/// The capabilities of a structure of which `bytes` are all bytes, the structure's own included, and the first
/// of which is at `first`: their ids, and bytes behind the header.
pub(crate) fn chain(bytes: &[u8], first: u32) -> Result<Vec<(u16, &[u8])>, Malformed> {
    let mut found = Vec::new();
    let mut at = first;
    while at != 0 {
        let capability = bytes.get(at as usize..).ok_or(Malformed)?;
        let (id, rest) = capability.split_first_chunk().ok_or(Malformed)?;
        let (_version, rest) = rest.split_first_chunk::<2>().ok_or(Malformed)?;
        let (next, body) = rest.split_first_chunk().ok_or(Malformed)?;
        found.push((u16::from_ne_bytes(*id), body));
        if found.len() > MOST {
            return Err(Malformed);
        }
        at = u32::from_ne_bytes(*next);
    }
    Ok(found)
}

/// The areas of a region that can be mapped, if it says that only some can.
pub(crate) fn sparse_areas(bytes: &[u8], first: u32) -> Result<Option<Vec<Area>>, Malformed> {
    let mut areas = None;
    for (id, body) in chain(bytes, first)? {
        if id != SPARSE_MMAP {
            continue;
        }
        // nr_areas, reserved, then the areas.
        let (count, rest) = body.split_first_chunk().ok_or(Malformed)?;
        let pairs = rest.get(4..).ok_or(Malformed)?.as_chunks::<16>().0;
        let count = u32::from_ne_bytes(*count) as usize;
        let pairs = pairs.get(..count).filter(|_| count <= MOST);
        let area = |pair: &[u8; 16]| {
            let (words, _) = pair.as_chunks::<8>();
            Area {
                offset: words.first().map_or(0, |word| u64::from_ne_bytes(*word)),
                size: words.get(1).map_or(0, |word| u64::from_ne_bytes(*word)),
            }
        };
        areas = Some(pairs.ok_or(Malformed)?.iter().map(area).collect());
    }
    Ok(areas)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(id: u16, next: u32) -> Vec<u8> {
        let mut bytes = id.to_ne_bytes().to_vec();
        bytes.extend(1u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes
    }

    fn sparse(next: u32, count: u32, areas: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = header(SPARSE_MMAP, next);
        bytes.extend(count.to_ne_bytes());
        bytes.extend([0; 4]);
        for (offset, size) in areas {
            bytes.extend(offset.to_ne_bytes());
            bytes.extend(size.to_ne_bytes());
        }
        bytes
    }

    /// Behind a structure of 32 bytes.
    fn behind(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = vec![0xaa; 32];
        bytes.extend(parts.concat());
        bytes
    }

    #[test]
    fn areas_are_found_behind_other_capabilities() {
        let bytes = behind(&[
            header(3, 40),
            sparse(0, 2, &[(0x1000, 0x2000), (0x8000, 0x1000)]),
        ]);
        let area = |offset, size| Area { offset, size };
        assert_eq!(
            sparse_areas(&bytes, 32),
            Ok(Some(vec![area(0x1000, 0x2000), area(0x8000, 0x1000)]))
        );
        assert_eq!(sparse_areas(&bytes, 0), Ok(None));
        assert_eq!(sparse_areas(&behind(&[header(3, 0)]), 32), Ok(None));
        assert_eq!(
            sparse_areas(&behind(&[sparse(0, 0, &[])]), 32),
            Ok(Some(vec![]))
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let chains = [
            (behind(&[header(3, 32)]), 32),                     // itself
            (behind(&[header(3, 40), header(3, 32)]), 32),      // a circle
            (behind(&[header(3, 4000)]), 32),                   // outside
            (behind(&[]), 32),                                  // nothing there
            (behind(&[header(3, 0)[..7].to_vec()]), 32),        // cut off
            (behind(&[header(SPARSE_MMAP, 0)]), 32),            // no count
            (behind(&[sparse(0, 2, &[(0, 4096)])]), 32),        // fewer areas than it says
            (behind(&[sparse(0, u32::MAX, &[(0, 4096)])]), 32), // absurdly many
            (behind(&[header(3, u32::MAX)]), 32),
            (vec![], u32::MAX),
        ];
        for (bytes, first) in chains {
            assert_eq!(sparse_areas(&bytes, first), Err(Malformed), "{bytes:?}");
        }
    }
}
