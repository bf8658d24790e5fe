//! Finding the state dict in what training scripts save: the files that tests/golden/structures.py writes, and files of other
//! kinds.

use super::{config, structure, CPU};
use crate::common::{message, to_vec};
use candle_core::Result;
use candle_hashed_embedding_bag::StateDict;

/// Checks that this is the state dict of structures.py, its hashed values counted from `first`.
#[track_caller]
fn assert_state_dict(state: Result<StateDict>, first: f64) {
    let mut state = state.unwrap();
    let layer = state
        .hashed_embedding_bag("user", 10, 4, config(), &CPU)
        .unwrap();
    let values: Vec<f64> = (0..40).map(|i| first + i as f64 / 4.0).collect();
    assert_eq!(to_vec(layer.hashed_weight()).unwrap(), values);
    let mut take = |key| state.take(key, &CPU).unwrap();
    let (weight, bias) = (take("head.weight"), take("head.bias"));
    assert_eq!(weight.dims(), [2, 4]);
    assert_eq!(to_vec(&weight).unwrap(), [0., 1., 2., 3., 4., 5., 6., 7.]);
    assert_eq!(to_vec(&bias).unwrap(), [0.5, -0.5]);
    assert_eq!(state.keys().count(), 0);
}

#[test]
fn a_state_dict_that_is_stored_once_is_read_wherever_it_is_used() {
    for key in ["model", "state_dict", "models.1", "ema.shadow"] {
        assert_state_dict(structure("shared", Some(key)), 0.0);
    }
    assert_state_dict(structure("shared", Some("models.0")), 100.0);
}

#[test]
fn objects_of_any_class_are_passed_over_in_every_protocol() {
    for file in ["objects", "protocol4", "protocol5"] {
        assert_state_dict(structure(file, Some("state_dict")), 0.0);
        // A subclass of dict is a dict, though this one holds no tensors.
        let parameters = structure(file, Some("hyper_parameters")).unwrap();
        assert_eq!(parameters.keys().count(), 0);
        for (key, said) in [
            ("queue", "an object of collections.deque"),
            ("args", "an object of argparse.Namespace"),
            ("countdown", "an object of __main__.Countdown"),
            ("size", "an object of torch.Size"),
            ("surrogate", "a value"),
            ("nothing", "a value"),
        ] {
            let got = message(structure(file, Some(key)));
            assert!(
                got.contains(&format!("import: {said} where a state dict should be")),
                "{got}"
            );
        }
    }
}

#[test]
fn dotted_keys_lead_further_down() {
    assert_state_dict(structure("nested", Some("state_dict.generator")), 0.0);
    // The second key has a dot itself.
    assert_state_dict(structure("nested", Some("state_dict.critic.v2")), 100.0);
    let mut state = structure("nested", Some("optimizer.state.0")).unwrap();
    let step = state.take("step", &CPU).unwrap();
    assert_eq!(to_vec(&step).unwrap(), [7.0]);

    let all = "state_dict.generator or state_dict.critic.v2 or optimizer.state.0";
    for (key, said) in [
        (None, "no tensors at the top; the state dict may be under "),
        (
            Some("model"),
            "the file holds no model; the state dict may be under ",
        ),
        (
            Some("state_dict.gen"),
            "the file holds no state_dict.gen; the state dict may be under ",
        ),
        (
            Some("epoch.1"),
            "the file holds no epoch.1; the state dict may be under ",
        ),
    ] {
        let got = message(structure("nested", key));
        assert!(got.contains(&format!("import: {said}{all}")), "{got}");
        assert!(got.contains("nested.pth"), "{got}");
    }
    let got = message(structure("nested", Some("state_dict")));
    assert!(
        got.contains(
            "no tensors under state_dict; the state dict may be under state_dict.generator or state_dict.critic.v2: open it with that key"
        ),
        "{got}"
    );
}

#[test]
fn an_entry_that_is_missing_is_found_within_wrappers() {
    let mut state = structure("wrapped", None).unwrap();
    let got = message(state.hashed_embedding_bag("user", 10, 4, config(), &CPU));
    assert_eq!(
        got,
        "import: user.hashed_weight is missing, but there is module._orig_mod.user.hashed_weight; begin the prefix with module._orig_mod."
    );
    let layer = state.hashed_embedding_bag("module._orig_mod.user", 10, 4, config(), &CPU);
    assert_eq!(layer.unwrap().hashed_weight().dims(), [40]);
    // Wrapped in the middle as well.
    let got = message(state.take("tower.weight", &CPU));
    assert_eq!(
        got,
        "import: tower.weight is missing, but there is module._orig_mod.tower._orig_mod.weight"
    );
    // A prefix that a framework adds is found too, by the end of the key.
    let got = message(state.take("weight", &CPU));
    assert!(
        got.starts_with(
            "import: weight is missing, but there is module._orig_mod.head.weight and "
        ),
        "{got}"
    );
    let got = message(state.take("tail.weight", &CPU));
    assert!(
        got.starts_with("import: tail.weight is missing from module._orig_mod.head.bias, "),
        "{got}"
    );
}

#[test]
fn files_of_other_kinds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pth");
    assert!(message(StateDict::open(&path)).contains("No such file"));
    for bytes in [
        &b""[..],
        b"PK\x03\x04",
        b"PK\x03\x04aaaaaaaaaaaaaa",
        &[0x80, 2, 0x8a],
        &[0xff; 64],
    ] {
        std::fs::write(&path, bytes).unwrap();
        let got = message(StateDict::open(&path));
        assert!(got.contains("model.pth"), "{got}");
    }
    let got = message(StateDict::open_nested(
        "tests/golden/robe_dlrm.safetensors",
        "state_dict",
    ));
    assert!(
        got.contains("safetensors holds nothing nested, such as state_dict"),
        "{got}"
    );
    let got = message(StateDict::open_nested(
        "tests/golden/robe_dlrm.pth",
        "test_acc",
    ));
    assert!(
        got.contains(
            "import: a value where a state dict should be; save module.state_dict(), not the module"
        ),
        "{got}"
    );
}
