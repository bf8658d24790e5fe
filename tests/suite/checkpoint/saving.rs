//! Saving replaces a file as a whole, and refuses what would not be opened again.

use super::Folder;
use crate::common::message;
use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding_bag_collection, Checkpoint, HashedEmbeddingBag,
};
use candle_nn::{VarBuilder, VarMap};
use std::path::Path;

#[test]
fn saving_refuses_two_tensors_of_one_name() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(16, DType::F32, &device)?;
    let layer = HashedEmbeddingBag::new(weight.clone(), 10, 4, Default::default())?;
    let same = [("a.hashed_weight".to_string(), weight.clone())];
    checkpoint::save(&path, same, [("a", &layer)])?;
    let other = [("a.hashed_weight".to_string(), weight.copy()?)];
    let refused = checkpoint::save(&path, other, [("a", &layer)]);
    assert!(message(refused).contains("two different tensors are named a.hashed_weight"));
    let refused = checkpoint::save(&path, [], [("a", &layer), ("a", &layer)]);
    assert!(message(refused).contains("two layers are named a"));
    Checkpoint::open(&path)?;
    Ok(())
}

/// Two parameters in the file would train apart.
#[test]
fn tables_of_a_collection_are_not_saved_apart() -> Result<()> {
    let device = &Device::Cpu;
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device).pp("both");
    let tables = [("user", 10), ("movie", 20)];
    let collection = hashed_embedding_bag_collection(tables, 8, 0.5, Default::default(), vb)?;
    let (user, movie) = (collection.table("user")?, collection.table("movie")?);

    let got = message(checkpoint::save(&path, [], [("u", &user), ("m", &movie)]));
    assert!(
        got.contains("m.hashed_weight and u.hashed_weight are one tensor"),
        "{got}"
    );
    // One table beside the variables, which hold the parameter of the collection under its own name.
    let got = message(checkpoint::save(
        &path,
        checkpoint::variables(&vars),
        [("u", &user)],
    ));
    assert!(
        got.contains("u.hashed_weight and both.hashed_weight are one tensor"),
        "{got}"
    );
    assert!(!path.exists());

    checkpoint::save(&path, checkpoint::variables(&vars), [("both", &collection)])?;
    // One table alone shares nothing.
    checkpoint::save(&path, [], [("u", &user)])
}

/// The one name that the format keeps for itself.
#[test]
fn saving_refuses_a_tensor_named_metadata() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(16, DType::F32, &device)?;
    let layer = HashedEmbeddingBag::new(weight.clone(), 10, 4, Default::default())?;
    let refused = checkpoint::save(&path, [("__metadata__".into(), weight)], [("a", &layer)]);
    assert!(message(refused).contains("no tensor can be named __metadata__"));
    assert!(!path.exists());
    Ok(())
}

/// Saving replaces the file, leaves no other behind, and an open checkpoint goes on reading the old one.
#[test]
fn saving_replaces_the_file_whole() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let save = |value: f64| {
        let weight = Tensor::full(value, 1 << 16, &device)?;
        let layer = HashedEmbeddingBag::new(weight, 1 << 16, 4, Default::default())?;
        checkpoint::save(&path, [], [("a", &layer)])
    };
    save(1.0)?;
    let old = Checkpoint::open(&path)?;
    save(2.0)?;
    let new = Checkpoint::open(&path)?;
    let first = |checkpoint: &Checkpoint| -> Result<f64> {
        checkpoint
            .tensor("a.hashed_weight", &device)?
            .get(0)?
            .to_scalar()
    };
    assert_eq!((first(&old)?, first(&new)?), (1.0, 2.0));
    assert_eq!(std::fs::read_dir(folder.0.path())?.count(), 1);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let other = folder.file("other");
        std::fs::write(&other, "")?;
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&other));
    }

    let refused = checkpoint::save(
        folder.file("no/such/folder"),
        [],
        [] as [(&str, &HashedEmbeddingBag); 0],
    );
    assert!(message(refused).contains("No such file"));
    Ok(())
}

/// A link stays and the file behind it is replaced, where the link leads to one, and where it does not yet.
#[cfg(unix)]
#[test]
fn saving_follows_symbolic_links() -> Result<()> {
    use std::os::unix::fs::symlink;
    let (folder, device) = (Folder::new(), Device::Cpu);
    std::fs::create_dir(folder.file("models"))?;
    let save = |path: &Path, value: f32| {
        let layer =
            HashedEmbeddingBag::new(Tensor::full(value, 16, &device)?, 10, 4, Default::default())?;
        checkpoint::save(path, [], [("a", &layer)])
    };
    let first = |path: &Path| -> Result<f32> {
        let weight = Checkpoint::open(path)?.tensor("a.hashed_weight", &device)?;
        weight.get(0)?.to_scalar()
    };
    // Relative links, of which one leads to the other.
    let (link, next, real) = (
        folder.file("current"),
        folder.file("models/latest"),
        folder.file("models/2"),
    );
    symlink("models/latest", &link)?;
    symlink("2", &next)?;
    for value in [1.0, 2.0] {
        save(&link, value)?;
        assert!(link.is_symlink() && next.is_symlink() && !real.is_symlink());
        assert_eq!((first(&real)?, first(&link)?), (value, value));
    }
    assert_eq!(std::fs::read_dir(folder.file("models"))?.count(), 2);

    let (a, b) = (folder.file("a"), folder.file("b"));
    symlink("a", &b)?;
    symlink("b", &a)?;
    assert!(message(save(&a, 1.0)).contains("too many levels of symbolic links"));
    Ok(())
}

#[cfg(unix)]
#[test]
fn saving_keeps_the_mode_of_the_file_it_replaces() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let layer = HashedEmbeddingBag::new(
        Tensor::zeros(16, DType::F32, &device)?,
        10,
        4,
        Default::default(),
    )?;
    let save = |path: &Path| checkpoint::save(path, [], [("a", &layer)]);
    save(&path)?;
    for mode in [0o600, 0o640, 0o664] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode))?;
        save(&path)?;
        assert_eq!(path.metadata()?.permissions().mode() & 0o7777, mode);
    }
    Ok(())
}

/// What is not a regular file is not replaced: a rename would put a file in its place.
#[cfg(unix)]
#[test]
fn saving_refuses_what_is_not_a_regular_file() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let layer = HashedEmbeddingBag::new(
        Tensor::zeros(16, DType::F32, &device)?,
        10,
        4,
        Default::default(),
    )?;
    let socket = folder.file("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let directory = folder.file("folder");
    std::fs::create_dir(&directory)?;
    for path in [&socket, &directory] {
        let got = message(checkpoint::save(path, [], [("a", &layer)]));
        assert!(got.contains("not a regular file"), "{got}");
        assert!(got.contains(path.to_str().unwrap()), "{got}");
        let checked = message(checkpoint::check_writable(path));
        assert!(checked.contains("not a regular file"), "{checked}");
    }
    assert_eq!(std::fs::read_dir(folder.0.path())?.count(), 2);
    Ok(())
}

/// What can be saved is known before, and finding out leaves nothing behind.
#[test]
fn checking_a_path_changes_nothing() -> Result<()> {
    let folder = Folder::new();
    let (new, old) = (folder.file("new"), folder.file("old"));
    std::fs::write(&old, "kept")?;
    checkpoint::check_writable(&new)?;
    checkpoint::check_writable(&old)?;
    assert_eq!(std::fs::read_to_string(&old)?, "kept");
    assert_eq!(std::fs::read_dir(folder.0.path())?.count(), 1);

    let none = folder.file("no/such/folder");
    let said = message(checkpoint::check_writable(&none));
    assert!(said.contains("No such file"), "{said}");
    #[cfg(unix)]
    {
        // A link leads there; a save would follow it.
        let link = folder.file("link");
        std::os::unix::fs::symlink(&none, &link)?;
        let said = message(checkpoint::check_writable(&link));
        assert!(said.contains("No such file"), "{said}");
    }
    Ok(())
}
