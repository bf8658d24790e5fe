//! Files that are almost checkpoints: a header of the right form, with extreme values and a few errors.
#![no_main]

use arbitrary::{Result, Unstructured};
use candle_hashed_embedding_bag_fuzz::open_checkpoint;
use libfuzzer_sys::fuzz_target;
use serde_json::{json, Map, Value};

const NAMES: [&str; 5] = ["", "a", "b.c", "a.hashed_embedding_bag", "ü"];
const EDGES: [u64; 16] = [
    0,
    1,
    2,
    16,
    31,
    32,
    33,
    64,
    (1 << 24) - 1,
    (1 << 24) + 1,
    (1 << 31) - 1,
    1 << 32,
    1 << 53,
    1 << 62,
    1 << 63,
    u64::MAX,
];
/// The dtypes of safetensors, with their bits per value.
const DTYPES: [(&str, u64); 20] = [
    ("F32", 32),
    ("F16", 16),
    ("BF16", 16),
    ("F64", 64),
    ("I64", 64),
    ("I32", 32),
    ("I16", 16),
    ("I8", 8),
    ("U8", 8),
    ("U16", 16),
    ("U32", 32),
    ("U64", 64),
    ("BOOL", 8),
    ("F8_E4M3", 8),
    ("F8_E5M2", 8),
    ("F8_E8M0", 8),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("F4", 4),
    ("C64", 64),
];

/// Mostly `usual`, now and then something else.
fn or_odd(u: &mut Unstructured, usual: Value) -> Result<Value> {
    if !u.ratio(1, 24)? {
        return Ok(usual);
    }
    Ok(match u.int_in_range(0..=7)? {
        0 => Value::Null,
        1 => json!(-1),
        2 => json!(u.arbitrary::<f64>()?),
        3 => json!("1"),
        4 => json!([usual]),
        5 => json!({ "version": usual }),
        6 => json!(u.arbitrary::<i64>()?),
        _ => json!(u.arbitrary::<u64>()?),
    })
}

/// Mostly a small number.
fn number(u: &mut Unstructured) -> Result<u64> {
    Ok(match u.int_in_range(0..=3)? {
        0 => *u.choose(&EDGES)?,
        _ => u.int_in_range(1..=64)?,
    })
}

/// A hash that reads a tensor of the rows.
fn hash_of_rows(u: &mut Unstructured) -> Result<Value> {
    let block = u.int_in_range(1..=8)?;
    let block = or_odd(u, json!(block))?;
    Ok(match u.int_in_range(0..=2)? {
        0 => {
            let (bits, keys) = (u.int_in_range(1..=8)?, u.int_in_range(1..=5)?);
            let numbers = [0; 21].map(|_| 1 + u.arbitrary::<u32>().unwrap_or(0) / 2);
            json!({
                "kind": "lma",
                "random_numbers": or_odd(u, json!(numbers))?,
                "key_bits": or_odd(u, json!(bits))?,
                "keys_to_use": or_odd(u, json!(keys))?,
                "block": block,
            })
        }
        1 => json!({
            "kind": "semantic",
            "seed": or_odd(u, json!(0))?,
            "key_bits": or_odd(u, json!(16))?,
            "keys_to_use": or_odd(u, json!(2))?,
            "block": block,
            "signed": u.arbitrary::<bool>()?,
        }),
        _ => json!({ "kind": "slot_table", "block": block }),
    })
}

/// Describes the tensor that the hash of a layer reads, mostly as it should be, with its data at `start`, and returns its name and
/// where its data end; `None` for other hashes.
fn row_tensor(
    u: &mut Unstructured,
    layer: &Value,
    start: u64,
) -> Result<Option<(&'static str, Value, u64)>> {
    let integer = |value: &Value| value.as_u64().unwrap_or(0);
    let (hash, tables) = (&layer["hash"], layer["tables"].as_array());
    let rows = match tables {
        Some(tables) => tables
            .iter()
            .map(|table| integer(&table["num_embeddings"]))
            .fold(0, u64::saturating_add),
        None => integer(&layer["num_embeddings"]).saturating_add(integer(&layer["first_row"])),
    };
    let (name, dtype, columns, bytes) = match hash["kind"].as_str() {
        Some("lma" | "semantic") => ("signatures", "I64", None, 8),
        Some("slot_table") => {
            let block = integer(&hash["block"]).max(1);
            let columns = integer(&layer["embedding_dim"]).div_ceil(block);
            ("slot_table", "U32", Some(columns), 4)
        }
        _ => return Ok(None),
    };
    let (rows, columns) = (rows.min(1 << 10), columns.map(|columns| columns.min(16)));
    let shape = [Some(rows), columns];
    let shape: Vec<_> = shape.into_iter().flatten().collect();
    let end = start + shape.iter().product::<u64>() * bytes;
    let tensor = json!({
        "dtype": or_odd(u, json!(dtype))?,
        "shape": or_odd(u, json!(shape))?,
        "data_offsets": [or_odd(u, json!(start))?, or_odd(u, json!(end))?],
    });
    Ok(Some((name, tensor, end)))
}

/// The description of a layer, or of a collection of tables with features.
fn layer(u: &mut Unstructured, collection: bool) -> Result<Value> {
    let hash = if u.ratio(1, 3)? {
        hash_of_rows(u)?
    } else if u.arbitrary()? {
        let block = 1 << u.int_in_range(0..=5)?;
        let mut hash = json!({
            "kind": "mix",
            "seed": or_odd(u, json!(0))?,
            "block": or_odd(u, json!(block))?,
            "signed": u.arbitrary::<bool>()?,
        });
        if u.arbitrary()? {
            hash["balanced"] = or_odd(u, json!(true))?;
        }
        hash
    } else {
        let [a, b, c, modulus] = [number(u)?, number(u)?, number(u)?, number(u)?];
        let block = u.int_in_range(1..=8)?;
        let mut hash = json!({
            "kind": "affine",
            "a": or_odd(u, json!(a))?,
            "b": or_odd(u, json!(b))?,
            "c": or_odd(u, json!(c))?,
            "modulus": or_odd(u, json!(modulus))?,
            "block": or_odd(u, json!(block))?,
        });
        if u.arbitrary()? {
            let overflow = *u.choose(&["wrap", "refuse"])?;
            hash["overflow"] = or_odd(u, json!(overflow))?;
        }
        hash
    };
    let mode = *u.choose(&["sum", "mean", "max"])?;
    let embedding_dim = number(u)?;
    let mut layer = json!({
        "embedding_dim": or_odd(u, json!(embedding_dim))?,
        "mode": or_odd(u, json!(mode))?,
        "padding_idx": if u.arbitrary()? { Value::Null } else { json!(u.arbitrary::<i64>()?) },
        "include_last_offset": u.arbitrary::<bool>()?,
        "hash": or_odd(u, hash)?,
    });
    if collection {
        let mut tables = vec![];
        let num_tables = u.int_in_range(0..=4)?;
        for i in 0..num_tables {
            let num_embeddings = number(u)?;
            tables.push(json!({
                "name": or_odd(u, json!(i.to_string()))?,
                "num_embeddings": or_odd(u, json!(num_embeddings))?,
            }));
        }
        layer["tables"] = or_odd(u, json!(tables))?;
        if u.arbitrary()? {
            let mut features = vec![];
            for i in 0..u.int_in_range(0..=4)? {
                let table = u.int_in_range(0..=num_tables)?;
                features.push(json!({
                    "name": or_odd(u, json!(format!("f{i}")))?,
                    "table": or_odd(u, json!(table.to_string()))?,
                }));
            }
            layer["features"] = or_odd(u, json!(features))?;
        }
    } else {
        let num_embeddings = number(u)?;
        layer["num_embeddings"] = or_odd(u, json!(num_embeddings))?;
        if u.ratio(1, 4)? {
            let first_row = number(u)?;
            layer["first_row"] = or_odd(u, json!(first_row))?;
        }
    }
    Ok(layer)
}

/// What a layer in low bits says of them, mostly right.
fn low_bit(u: &mut Unstructured, bits: u64) -> Result<Value> {
    let scale = f64::from(u.int_in_range(1..=1000)?) / 1000.0;
    let mut low_bit = json!({
        "bits": or_odd(u, json!(bits))?,
        "scale": or_odd(u, json!(scale))?,
    });
    if bits == 4 {
        low_bit["group"] = or_odd(u, json!(32))?;
    }
    or_odd(u, low_bit)
}

/// Describes a tensor of so many bytes, mostly, with its data at `start`, and returns where its data end.
fn bytes(u: &mut Unstructured, start: u64, len: u64) -> Result<(Value, u64)> {
    let end = start + len;
    let tensor = json!({
        "dtype": or_odd(u, json!("U8"))?,
        "shape": or_odd(u, json!([len]))?,
        "data_offsets": [or_odd(u, json!(start))?, or_odd(u, json!(end))?],
    });
    Ok((tensor, end))
}

/// Describes the tensor `name`, with its data at `start`, and returns where its data end.
fn tensor(u: &mut Unstructured, start: u64, layer: bool) -> Result<(Value, u64)> {
    let (dtype, bits) = if layer && !u.ratio(1, 8)? {
        DTYPES[u.int_in_range(0..=3)?]
    } else {
        *u.choose(&DTYPES)?
    };
    let shape = if layer && !u.ratio(1, 8)? {
        vec![u.int_in_range(1u64..=8)? * 32]
    } else {
        let rank = u.int_in_range(0..=4)?;
        (0..rank).map(|_| number(u)).collect::<Result<_>>()?
    };
    let values = shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
    // Only files of moderate size are written; a tensor that claims to be larger claims a wrong end.
    let bytes = values.map_or(0, |n| n.saturating_mul(bits) / 8);
    let end = start + if bytes > 1 << 14 { 0 } else { bytes };
    let tensor = json!({
        "dtype": or_odd(u, json!(dtype))?,
        "shape": or_odd(u, json!(shape))?,
        "data_offsets": [or_odd(u, json!(start))?, or_odd(u, json!(end))?],
    });
    Ok((tensor, end))
}

fn file(u: &mut Unstructured) -> Result<Vec<u8>> {
    let (mut header, mut end) = (Map::new(), 0);
    let (mut layers, mut collections) = (Map::new(), Map::new());
    let mut version = 1;
    for _ in 0..u.int_in_range(1..=3)? {
        let name = *u.choose(&NAMES)?;
        let is_collection = u.ratio(1, 3)?;
        let mut description = layer(u, is_collection)?;
        let bits = *u.choose(&[0, 0, 8, 4])?;
        if bits > 0 {
            version = 2;
            description["low_bit"] = low_bit(u, bits)?;
        }
        let prefix = if name.is_empty() { "" } else { "." };
        if let Some((tensor, value, next)) = row_tensor(u, &description, end)? {
            let tensor = format!("{name}{prefix}{tensor}");
            if !header.contains_key(&tensor) && !u.ratio(1, 24)? {
                header.insert(tensor, value);
                end = next;
            }
        }
        let all = if is_collection {
            &mut collections
        } else {
            &mut layers
        };
        all.insert(name.to_string(), description);
        let weight = format!("{name}{prefix}hashed_weight");
        let len = u.int_in_range(1u64..=8)? * 32;
        let (value, next) = match bits {
            0 => tensor(u, end, true)?,
            bits => bytes(u, end, len * bits / 8)?,
        };
        if bits == 4 && !header.contains_key(&weight) {
            let (shifts, after) = bytes(u, next, len.div_ceil(128))?;
            header.insert(format!("{weight}_shift"), shifts);
            header.insert(weight, value);
            end = after;
            continue;
        }
        if !header.contains_key(&weight) {
            header.insert(weight, value);
            end = next;
        }
    }
    for i in 0..u.int_in_range(0..=2)? {
        let (value, next) = tensor(u, end, false)?;
        header.insert(format!("other{i}"), value);
        end = next;
    }
    let description = json!({
        "version": or_odd(u, json!(version))?,
        "layers": or_odd(u, Value::Object(layers))?,
        "collections": or_odd(u, Value::Object(collections))?,
    });
    let metadata = json!({ "hashed_embedding_bag": description.to_string() });
    header.insert("__metadata__".into(), or_odd(u, metadata)?);
    let header = Value::Object(header).to_string();
    let len = header.len() as u64;
    let len = if u.ratio(1, 32)? { number(u)? } else { len };
    let mut file = len.to_le_bytes().to_vec();
    file.extend(header.bytes());
    // Zeros name the first block, which exists; other numbers of blocks are too large.
    let byte = *u.choose(&[0, 0x3c])?;
    file.resize(file.len() + end as usize, byte);
    for _ in 0..u.int_in_range(0..=3)? {
        if u.ratio(1, 4)? {
            let at = u.choose_index(file.len())?;
            file[at] = u.arbitrary()?;
        }
    }
    Ok(file)
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = file(&mut Unstructured::new(bytes)) {
        open_checkpoint(&file);
    }
});
