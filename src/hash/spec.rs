//! The JSON form of a hash, as in a checkpoint.

use super::{Affine, Balanced, Hash, Lma, Mix, Overflow, Semantic, SlotTable};
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
    Lma {
        random_numbers: Vec<i64>,
        key_bits: usize,
        keys_to_use: usize,
        block: usize,
    },
    Semantic {
        seed: u64,
        key_bits: usize,
        keys_to_use: usize,
        block: usize,
        signed: bool,
    },
    #[serde(rename = "slot_table")]
    SlotTable { block: usize },
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
            HashSpec::Lma {
                random_numbers,
                key_bits,
                keys_to_use,
                block,
            } => Self::Lma(Lma::new(&random_numbers, key_bits, keys_to_use, block)?),
            HashSpec::Semantic {
                seed,
                key_bits,
                keys_to_use,
                block,
                signed,
            } => Self::Semantic(Semantic {
                seed,
                key_bits,
                keys_to_use,
                block,
                signed,
            }),
            HashSpec::SlotTable { block } => Self::SlotTable(SlotTable { block }),
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
            Hash::Lma(lma) => Self::Lma {
                random_numbers: lma.random_numbers().iter().map(|&r| r.into()).collect(),
                key_bits: lma.key_bits(),
                keys_to_use: lma.keys_to_use(),
                block: lma.block(),
            },
            Hash::Semantic(Semantic {
                seed,
                key_bits,
                keys_to_use,
                block,
                signed,
            }) => Self::Semantic {
                seed,
                key_bits,
                keys_to_use,
                block,
                signed,
            },
            Hash::SlotTable(SlotTable { block }) => Self::SlotTable { block },
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
            (
                Hash::lma(
                    &[11, 7, 5, 3, 0, 0, 0, 0, 0, 0, 0, 13, 17, 19, 23, 29],
                    16,
                    2,
                    8,
                )
                .unwrap(),
                r#"{"kind":"lma","random_numbers":[11,7,5,3,0,0,0,0,0,0,0,13,17,19,23],"key_bits":16,"keys_to_use":2,"block":8}"#,
            ),
            (
                Hash::semantic(16),
                r#"{"kind":"semantic","seed":0,"key_bits":16,"keys_to_use":2,"block":16,"signed":true}"#,
            ),
            (Hash::slot_table(4), r#"{"kind":"slot_table","block":4}"#),
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
            (
                r#"{"kind":"semantic","seed":0,"key_bits":24,"keys_to_use":2,"block":16,"signed":true}"#,
                "key_bits of a semantic hash must be 1, 2, 4, 8, 16 or 32, got 24",
            ),
            (
                r#"{"kind":"semantic","seed":0,"key_bits":16,"keys_to_use":5,"block":16,"signed":true}"#,
                "keys_to_use of a semantic hash must lie in 1..=4 where keys have 16 bits, got 5",
            ),
            (
                r#"{"kind":"lma","random_numbers":[11,7,5,3],"key_bits":4,"keys_to_use":8,"block":1}"#,
                "LMA with keys_to_use 8 has at least 27 random_numbers, got 4",
            ),
            (
                r#"{"kind":"slot_table","block":0}"#,
                "block must lie in 1..=16777216, got 0",
            ),
        ] {
            let got = serde_json::from_str::<Hash>(json).unwrap_err().to_string();
            assert!(got.contains(message), "{json}: {got}");
        }
    }
}
