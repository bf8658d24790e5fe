//! Archives and pickles made by hand, most of them broken: they give errors or tensors, but no panic.

use super::{config, CPU};
use crate::common::{message, to_vec, Draws};
use candle_core::{DType, Result};
use candle_hashed_embedding_bag::StateDict;
use std::collections::HashMap;
use std::io::{Cursor, Read, Write};
use std::time::{Duration, Instant};
use zip::write::SimpleFileOptions;
use zip::{ZipArchive, ZipWriter};

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    for (name, bytes) in files {
        zip.start_file(*name, SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn open(bytes: &[u8]) -> Result<StateDict> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    StateDict::open(file.path())
}

fn open_at(bytes: &[u8], key: &str) -> Result<StateDict> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    StateDict::open_nested(file.path(), key)
}

fn open_pickle(pickle: &[u8]) -> Result<StateDict> {
    open(&archive(&[("m/data.pkl", pickle), ("m/data/0", &[0; 48])]))
}

fn string(text: &str) -> Vec<u8> {
    [
        &b"X"[..],
        &(text.len() as u32).to_le_bytes(),
        text.as_bytes(),
    ]
    .concat()
}

fn integer(n: i64) -> Vec<u8> {
    [&[0x8a, 8], &n.to_le_bytes()[..]].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", items.concat().as_slice(), b"t"].concat()
}

/// The pickle of a tensor in storage 0.
fn tensor(class: &str, offset: i64, dims: &[i64], strides: &[i64]) -> Vec<u8> {
    let integers = |values: &[i64]| tuple(&values.iter().map(|&n| integer(n)).collect::<Vec<_>>());
    let storage = tuple(&[
        string("storage"),
        format!("ctorch\n{class}\n").into_bytes(),
        string("0"),
        string("cpu"),
        integer(12),
    ]);
    let args = [
        [storage, b"Q".to_vec()].concat(),
        integer(offset),
        integers(dims),
        integers(strides),
        vec![0x89],
        b"}".to_vec(),
    ];
    [
        &b"ctorch._utils\n_rebuild_tensor_v2\n"[..],
        &tuple(&args),
        b"R",
    ]
    .concat()
}

fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<Vec<u8>> = entries
        .iter()
        .map(|(key, value)| [string(key), value.clone()].concat())
        .collect();
    [&[0x80, 2, b'}', b'('], entries.concat().as_slice(), b"u."].concat()
}

#[test]
fn views_of_a_storage() -> Result<()> {
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let load = |class: &str, offset, dims: &[i64], strides: &[i64]| {
        let pickle = dict(&[("a", tensor(class, offset, dims, strides))]);
        let file = archive(&[("m/data.pkl", &pickle), ("m/data/0", &bytes)]);
        open(&file)?.take("a", &CPU)
    };
    let flat = |offset, dims: &[i64], strides: &[i64]| -> Result<Vec<f64>> {
        to_vec(&load("FloatStorage", offset, dims, strides)?)
    };
    assert_eq!(flat(2, &[2, 3], &[3, 1])?, [2., 3., 4., 5., 6., 7.]);
    assert_eq!(flat(0, &[3, 2], &[1, 3])?, [0., 3., 1., 4., 2., 5.]);
    assert_eq!(flat(1, &[3], &[4])?, [1., 5., 9.]);
    assert_eq!(flat(11, &[1, 1], &[1000, 7])?, [11.]);
    assert_eq!(flat(5, &[], &[])?, [5.]);
    assert_eq!(load("FloatStorage", 0, &[0, 4], &[4, 1])?.dims(), [0, 4]);
    assert_eq!(load("ShortStorage", 0, &[24], &[1])?.dtype(), DType::I16);
    assert_eq!(
        load("BFloat16Storage", 0, &[24], &[1])?.dtype(),
        DType::BF16
    );

    let refused = |offset, dims: &[i64], strides: &[i64]| message(flat(offset, dims, strides));
    for got in [
        refused(0, &[13], &[1]),
        refused(12, &[1], &[1]),
        refused(0, &[4, 4], &[4, 1]),
        // A repetition, as `expand` makes one, and one that would fill the memory.
        refused(0, &[13, 1], &[0, 1]),
        refused(0, &[i64::MAX], &[0]),
        refused(0, &[i64::MAX, i64::MAX], &[i64::MAX, 1]),
        refused(0, &[0, i64::MAX, i64::MAX], &[0, 0, 0]),
        refused(i64::MAX, &[2], &[i64::MAX]),
    ] {
        assert!(got.contains("import: a: shape"), "{got}");
        assert!(got.contains("does not fit a storage of 12 values"), "{got}");
    }
    for (offset, dims, strides) in [
        (-1, &[1][..], &[1][..]),
        (0, &[-1], &[1]),
        (0, &[1], &[1, 1]),
    ] {
        let got = message(load("FloatStorage", offset, dims, strides));
        assert!(
            got.contains("not of the form that torch.save writes"),
            "{got}"
        );
    }
    Ok(())
}

#[test]
fn archives_that_are_none() {
    let good = dict(&[("a", tensor("FloatStorage", 0, &[12], &[1]))]);
    assert_eq!(
        open_pickle(&good).unwrap().keys().collect::<Vec<_>>(),
        ["a"]
    );
    // Values that are no tensors are passed over, as torch's _metadata is.
    let mixed = dict(&[("a", integer(1)), ("_metadata", b"}".to_vec())]);
    assert_eq!(open_pickle(&mixed).unwrap().keys().count(), 0);

    let float = tensor("FloatStorage", 0, &[12], &[1]);
    let twice = dict(&[("a", float.clone()), ("a", float)]);
    for (files, said) in [
        (vec![("m/data.txt", &b""[..])], "this zip file 0"),
        (
            vec![("m/data.pkl", &good[..]), ("n/data.pkl", &good)],
            "this zip file 2",
        ),
        (
            vec![("m/data.pkl", &good), ("m/byteorder", b"big")],
            "big-endian",
        ),
        (vec![("m/data.pkl", &twice)], "a is there twice"),
        (
            vec![("m/data.pkl", b"\x80\x02]q\x00.")],
            "a list where a state dict should be; save module.state_dict()",
        ),
        (
            vec![("m/data.pkl", b"\x80\x04\x95")],
            "import: m/data.pkl: the pickle ends early",
        ),
    ] {
        let got = message(open(&archive(&files)));
        assert!(got.contains(said), "{got}\nexpected {said}");
    }
    let mut lacking = open(&archive(&[("m/data.pkl", &good)])).unwrap();
    let got = message(lacking.take("a", &CPU));
    assert!(got.contains("not found"), "{got}");
    // One bit of a weight flipped: the checksum of the archive tells.
    let mut broken = archive(&[("m/data.pkl", &good), ("m/data/0", &[7; 48])]);
    let at = broken
        .windows(48)
        .position(|bytes| bytes == [7; 48])
        .unwrap();
    broken[at + 20] ^= 1;
    let got = message(open(&broken).unwrap().take("a", &CPU));
    assert!(got.contains("checksum"), "{got}");
}

/// Pickles that ask for more memory, time or stack than they may have.
#[test]
fn pickles_that_ask_too_much() {
    let asks = |pickle: Vec<u8>, said: &str| {
        let got = message(open_pickle(&pickle));
        assert!(got.contains(said), "{got}\nexpected {said}");
    };
    // Strings, bytes and integers of which there are two bytes.
    for op in [
        &b"X\xff\xff\xff\xff"[..],
        b"\x8c\xff",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"C\xff",
        b"B\xff\xff\xff\xff",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x8a\xff",
        b"\x8b\xff\xff\xff\xff",
        b"cab",
        b"N",
    ] {
        asks([b"\x80\x02", op, b"NN"].concat(), "ends early");
    }
    for (pickle, said) in [
        (&b"\x80\x02."[..], "takes a value that is not there"),
        (b"\x80\x02(N\x85\x86.", "takes a value that is not there"),
        (b"\x80\x02Nt.", "up to a mark that is not there"),
        (
            b"\x80\x02h\x07.",
            "recalls an object 7 that it has not stored",
        ),
        (b"\x80\x02}(Nu.", "a key without a value"),
        (b"\x80\x02]NNs.", "sets entries of what is no dict"),
        (b"\x80\x01}.", "pickle protocol 1, only 2 to 5 are read"),
        (
            b"\x80\x02}I1\n.",
            "opcode 0x49 is not one that Python 3 writes",
        ),
        (
            b"\x80\x02\x82\x01.",
            "opcode 0x82 is not one that Python 3 writes",
        ),
    ] {
        asks(pickle.to_vec(), said);
    }
    asks(b")".repeat((1 << 24) + 1), "uses more than 16777216 values");
    let uses = [&b"N"[..], &b"2".repeat(1 << 24)].concat();
    asks(uses, "uses more than 16777216 values");
    asks(b"(".repeat((1 << 24) + 1), "uses more than 16777216 values");
    // A tuple in a tuple in a tuple, a list in a list in a list, a dict in a dict in a dict.
    let no_state_dict = "where a state dict should be";
    asks(
        [&b")"[..], &[0x85; 1_000_000], b"."].concat(),
        no_state_dict,
    );
    asks(
        [&b"]".repeat(1_000_000)[..], &b"a".repeat(999_999), b"."].concat(),
        no_state_dict,
    );
    let deep = [
        &b"}K\x01".repeat(1_000_000)[..],
        b"}",
        &b"s".repeat(1_000_000),
        b".",
    ]
    .concat();
    assert_eq!(open_pickle(&deep).unwrap().keys().count(), 0);
    // With a tensor at the bottom, too deep for its key to be named.
    let tensors = dict(&[("a", tensor("FloatStorage", 0, &[12], &[1]))]);
    let bottom = &tensors[2..tensors.len() - 1];
    let deep = [
        &b"}K\x01".repeat(1_000_000)[..],
        bottom,
        &b"s".repeat(1_000_000),
        b".",
    ]
    .concat();
    assert_eq!(open_pickle(&deep).unwrap().keys().count(), 0);

    // Remember, recall twice, pair: each round doubles what is reached, but not what is held.
    let pairs = [&b")q\x00"[..], &b"h\x00h\x00\x86q\x00".repeat(900), b"."].concat();
    asks(pairs, no_state_dict);
    let dicts = [
        &b"}q\x00"[..],
        &b"}(K\x01h\x00K\x02h\x00uq\x00".repeat(900),
        b".",
    ]
    .concat();
    assert_eq!(open_pickle(&dicts).unwrap().keys().count(), 0);
    // A long tuple, recalled again and again.
    let long = [
        &b"("[..],
        &b")".repeat(10_000),
        b"tq\x00",
        &b"h\x00".repeat(10_000),
        b".",
    ]
    .concat();
    asks(long, no_state_dict);
    // A shape of more dimensions than any tensor has.
    let dims = tensor("FloatStorage", 0, &[1; 65], &[1; 65]);
    let got = message(open_pickle(&dict(&[("a", dims)])).unwrap().take("a", &CPU));
    assert_eq!(got, "import: a: not of the form that torch.save writes");
    // A dict that holds itself.
    let own = [&b"}q\x00"[..], &string("a"), b"h\x00s."].concat();
    let file = archive(&[("m/data.pkl", &own)]);
    assert_eq!(open(&file).unwrap().keys().count(), 0);
    let file = archive(&[("m/data.pkl", &own)]);
    assert_eq!(open_at(&file, "a.a.a").unwrap().keys().count(), 0);
    assert!(message(open_at(&file, "a.b")).contains("holds no a.b, nor any other state dict"));

    // Arguments that are not there.
    let sparse = b"ctorch._utils\n_rebuild_sparse_tensor\n)R".to_vec();
    let got = message(
        open_pickle(&dict(&[("a", sparse)]))
            .unwrap()
            .take("a", &CPU),
    );
    assert_eq!(
        got,
        "import: a: a tensor made by _rebuild_sparse_tensor, which is not read"
    );
    for args in [&b")"[..], b"(K\x01t", b"(K\x01K\x01K\x01K\x01t", b"}", b"N"] {
        for callable in [
            "_rebuild_tensor_v2",
            "_rebuild_parameter",
            "_rebuild_from_type_v2",
        ] {
            let call = [
                format!("ctorch._utils\n{callable}\n").as_bytes(),
                args,
                b"R",
            ]
            .concat();
            let got = message(open_pickle(&dict(&[("a", call)])).unwrap().take("a", &CPU));
            assert!(
                got.contains("not of the form")
                    || got.contains("which is not read")
                    || got.contains("a is missing"),
                "{got}"
            );
        }
    }
}

/// Two thousand views of 16 MiB: the storage is read and verified once, not for each of them.
#[test]
fn many_views_of_one_storage() -> Result<()> {
    const VIEWS: usize = 2000;
    let values: Vec<u8> = (0..1 << 22).flat_map(|i: u32| i.to_le_bytes()).collect();
    let row = |i: usize| tensor("IntStorage", i as i64, &[2], &[1 << 20]);
    let keys: Vec<String> = (0..VIEWS).map(|i| format!("{i:04}")).collect();
    let views: Vec<_> = (keys.iter().enumerate())
        .map(|(i, key)| (key.as_str(), row(i)))
        .collect();
    let file = archive(&[("m/data.pkl", &dict(&views)), ("m/data/0", &values)]);
    let mut state = open(&file)?;
    let start = Instant::now();
    for (i, key) in keys.iter().enumerate() {
        let tensor = state.take(key, &CPU)?.to_vec1::<i32>()?;
        assert_eq!(tensor, [i as i32, i as i32 + (1 << 20)]);
    }
    let time = start.elapsed();
    // Some 0.2 s; once for each view would be minutes, in a debug build.
    assert!(time < Duration::from_secs(20), "{time:?}");
    Ok(())
}

/// Files of an archive that are the same bytes could add up to any length.
#[test]
fn files_that_overlap_are_refused() {
    let pickle = dict(&[("a", tensor("FloatStorage", 0, &[12], &[1]))]);
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    for (name, bytes) in [("m/data.pkl", &pickle[..]), ("m/data/0", &[0; 48])] {
        zip.start_file(name, SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.shallow_copy_file("m/data/0", "m/data/1").unwrap();
    let file = zip.finish().unwrap().into_inner();
    let got = message(open(&file));
    assert!(got.contains("files of the archive overlap"), "{got}");
}

/// Truncations, and changed bytes, some behind good checksums: errors, or tensors, but no panic.
#[test]
fn no_file_panics() {
    let everything = |bytes: &[u8]| {
        for state in [open(bytes), open_at(bytes, "state_dict")] {
            let Ok(mut state) = state else {
                continue;
            };
            let _ = state.robe("", 1000, 10, 4, config(), &CPU);
            let keys: Vec<_> = state.keys().map(str::to_string).collect();
            for key in keys {
                let _ = (state.tensor_info(&key), state.take(&key, &CPU));
            }
        }
    };
    for (seed, path) in ["robe_cpu", "structures/objects", "structures/protocol4"]
        .iter()
        .enumerate()
    {
        let whole = std::fs::read(format!("tests/golden/{path}.pth")).unwrap();
        everything(&whole);
        for len in (0..whole.len()).step_by(17) {
            everything(&whole[..len]);
        }
        let mut files = HashMap::new();
        let mut zip = ZipArchive::new(Cursor::new(&whole)).unwrap();
        for i in 0..zip.len() {
            let mut file = zip.by_index(i).unwrap();
            let mut bytes = vec![];
            file.read_to_end(&mut bytes).unwrap();
            files.insert(file.name().unwrap().to_string(), bytes);
        }
        let mut draws = Draws::new(5 + seed as u64);
        for round in 0..1000 {
            // The archive's own bytes, or the pickle's with the archive written anew.
            if round % 3 == 0 {
                let mut bytes = whole.clone();
                let at = draws.below(bytes.len());
                bytes[at] = draws.below(256) as u8;
                everything(&bytes);
                continue;
            }
            let mut files = files.clone();
            let (_, pickle) = files
                .iter_mut()
                .find(|(name, _)| name.ends_with("data.pkl"))
                .unwrap();
            for _ in 0..1 + round % 4 {
                let at = draws.below(pickle.len());
                // An opcode as often as any byte.
                const OPCODES: &[u8] = b"cqr)R(XJtQKM\x85\x86\x87\x88\x89Nhjsu}b.\x81]Gae\x8a012\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96CB";
                pickle[at] = match draws.below(2) {
                    0 => OPCODES[draws.below(OPCODES.len())],
                    _ => draws.below(256) as u8,
                };
            }
            let files: Vec<_> = files
                .iter()
                .map(|(n, b)| (n.as_str(), b.as_slice()))
                .collect();
            everything(&archive(&files));
        }
    }
}
