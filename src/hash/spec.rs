//! The JSON form of a hash, as in a checkpoint.

use super::{Affine, Balanced, Hash, Mix, Overflow};
use serde::{Deserialize, Serialize};
use std::ops::Not;

/// The balanced family is written as `mix` with `"balanced": true`: older readers, which do not know it, then refuse the unknown
/// field instead of taking the hash for another one.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum HashSpec {
    Mix {
        seed: u64,
        block: usize,
        signed: bool,
        #[serde(default, skip_serializing_if = "Not::not")]
        balanced: bool,
    },
    Affine {
        a: u64,
        b: u64,
        c: u64,
        modulus: u64,
        block: usize,
        #[serde(default, skip_serializing_if = "is_wrap")]
        overflow: Overflow,
    },
}

fn is_wrap(overflow: &Overflow) -> bool {
    *overflow == Overflow::Wrap
}

impl TryFrom<HashSpec> for Hash {
    type Error = String;

    fn try_from(spec: HashSpec) -> Result<Self, String> {
        let hash = match spec {
            HashSpec::Mix {
                seed,
                block,
                signed,
                balanced: false,
            } => Self::Mix(Mix {
                seed,
                block,
                signed,
            }),
            HashSpec::Mix {
                seed,
                block,
                signed,
                balanced: true,
            } => Self::Balanced(Balanced {
                seed,
                block,
                signed,
            }),
            HashSpec::Affine {
                a,
                b,
                c,
                modulus,
                block,
                overflow,
            } => Self::Affine(Affine {
                a,
                b,
                c,
                modulus,
                block,
                overflow,
            }),
        };
        hash.check().map(|()| hash)
    }
}

impl From<Hash> for HashSpec {
    fn from(hash: Hash) -> Self {
        match hash {
            Hash::Mix(Mix {
                seed,
                block,
                signed,
            }) => Self::Mix {
                seed,
                block,
                signed,
                balanced: false,
            },
            Hash::Balanced(Balanced {
                seed,
                block,
                signed,
            }) => Self::Mix {
                seed,
                block,
                signed,
                balanced: true,
            },
            Hash::Affine(Affine {
                a,
                b,
                c,
                modulus,
                block,
                overflow,
            }) => Self::Affine {
                a,
                b,
                c,
                modulus,
                block,
                overflow,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_in_json() {
        let robe = Hash::robe(&[11, 7, 5, 3], 2).unwrap();
        for (hash, json) in [
            (
                Hash::balanced(16),
                r#"{"kind":"mix","seed":0,"block":16,"signed":true,"balanced":true}"#,
            ),
            (
                Hash::from(Mix {
                    seed: u64::MAX,
                    block: 64,
                    signed: false,
                }),
                r#"{"kind":"mix","seed":18446744073709551615,"block":64,"signed":false}"#,
            ),
            (
                Hash::affine(3, 5, 7, 11, 2),
                r#"{"kind":"affine","a":3,"b":5,"c":7,"modulus":11,"block":2}"#,
            ),
            (
                robe,
                r#"{"kind":"affine","a":3,"b":5,"c":7,"modulus":11,"block":2,"overflow":"refuse"}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&hash).unwrap(), json);
            assert_eq!(serde_json::from_str::<Hash>(json).unwrap(), hash);
        }
    }

    #[test]
    fn what_is_no_hash_is_refused() {
        for (json, message) in [
            (
                r#"{"kind":"mix","seed":0,"block":0,"signed":false}"#,
                "block must lie in 1..=16777216, got 0",
            ),
            (
                r#"{"kind":"mix","seed":0,"block":33,"signed":true,"balanced":true}"#,
                "a signed block must be at most 32, got 33",
            ),
            (
                r#"{"kind":"affine","a":3,"b":5,"c":7,"modulus":0,"block":2}"#,
                "the modulus of an affine hash must be at least 1, got 0",
            ),
            (
                r#"{"kind":"affine","a":3,"b":5,"c":7,"modulus":1,"block":2,"signed":true}"#,
                "unknown field `signed`",
            ),
            (
                r#"{"kind":"mix","seed":-1,"block":1,"signed":true}"#,
                "invalid value: integer `-1`",
            ),
            (r#"{"kind":"balanced"}"#, "unknown variant `balanced`"),
        ] {
            let got = serde_json::from_str::<Hash>(json).unwrap_err().to_string();
            assert!(got.contains(message), "{json}: {got}");
        }
    }
}
