//! A Hugging Face folder: `config.json`, weights in one or many safetensors files, and the tokenizer's files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use super::safetensors::Safetensors;
use super::{Checkpoint, TensorRef, missing_tensor, read_text};
use crate::model::config::{self, Config, GenerationDefaults};
use crate::{Error, ErrorCode, Result};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Longest configuration and longest index that are read. The index of a 400B model has 100 KiB.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// An open folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    config: Config,
    generation: GenerationDefaults,
    shards: Vec<Safetensors>,
    /// Which shard has a tensor.
    places: BTreeMap<String, usize>,
}

impl Folder {
    /// Opens the folder `path` and reads its configuration and the headers of its weights.
    pub fn open(path: &Path) -> Result<Folder> {
        let config_path = path.join(CONFIG);
        if !config_path.exists() {
            let mut message = format!("{}: no {CONFIG} in this folder", path.display());
            if let Some(other) = find(path, |name| name.ends_with(".gguf")) {
                message += &format!("; for the GGUF file in it, give {}", other.display());
            }
            return Err(Error::new(ErrorCode::NotFound, message));
        }
        let config = config::from_json(&read_text(&config_path, MAX_CONFIG_BYTES)?, &config_path)?;
        let generation_path = path.join(GENERATION);
        let generation = if generation_path.exists() {
            let text = read_text(&generation_path, MAX_CONFIG_BYTES)?;
            config::generation_from_json(&text, &generation_path, &config)?
        } else {
            GenerationDefaults { eos: config.eos.clone(), ..GenerationDefaults::default() }
        };
        let (shards, places) = open_weights(path)?;
        Ok(Folder { path: path.to_path_buf(), config, generation, shards, places })
    }
}

impl Checkpoint for Folder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn generation_defaults(&self) -> GenerationDefaults {
        self.generation.clone()
    }

    fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.shards[*self.places.get(name)?].tensor(name)
    }

    fn stored_names(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).collect()
    }

    fn missing(&self, name: &str) -> Error {
        match &self.shards[..] {
            [single] => missing_tensor(single.path(), name),
            _ => missing_tensor(&self.path.join(INDEX), name),
        }
    }
}

/// Opens the safetensors files of a folder, and finds out which has what.
fn open_weights(folder: &Path) -> Result<(Vec<Safetensors>, BTreeMap<String, usize>)> {
    let single = folder.join(SINGLE);
    if single.exists() {
        let shard = Safetensors::open(&single)?;
        let places = shard.names().map(|name| (name.to_string(), 0)).collect();
        return Ok((vec![shard], places));
    }
    let index = folder.join(INDEX);
    if index.exists() {
        return open_shards(folder, &index);
    }
    let mut message = format!("{}: neither {SINGLE} nor {INDEX} in this folder", folder.display());
    if let Some(other) = find(folder, |name| name.ends_with(".bin") || name.ends_with(".pth") || name.ends_with(".pt"))
    {
        message += &format!("; {} is a PyTorch pickle: convert it to safetensors", other.display());
    }
    Err(Error::new(ErrorCode::NotFound, message))
}

fn open_shards(folder: &Path, index: &Path) -> Result<(Vec<Safetensors>, BTreeMap<String, usize>)> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = read_text(index, MAX_INDEX_BYTES)?;
    let Index { weight_map } = serde_json::from_str(&text)
        .map_err(|error| Error::invalid_format(index, format!("not a valid index of safetensors: {error}")))?;

    let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    let mut shards: Vec<Safetensors> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for name in names {
        // A name with a separator, "..", or a root could lead anywhere in the file system.
        let mut components = Path::new(name).components();
        if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
            return Err(Error::invalid_format(index, format!("it names {name:?}, which is not a file in this folder")));
        }
        let path = folder.join(name);
        if !path.exists() {
            let message = format!("{}: it names {name:?}, which is not in the folder", index.display());
            return Err(Error::new(ErrorCode::NotFound, message));
        }
        let shard = Safetensors::open(&path)?;
        for tensor in shard.names() {
            if let Some(other) = places.insert(tensor.to_string(), shards.len()) {
                let message = format!("tensor {tensor:?} is also in {}", shards[other].path().display());
                return Err(Error::invalid_format(&path, message));
            }
        }
        shards.push(shard);
    }
    for (tensor, shard) in &weight_map {
        let found = places.get(tensor).map(|&place| shards[place].path());
        if found.and_then(Path::file_name) != Some(shard.as_ref()) {
            let message = match found {
                Some(found) => format!("it says that tensor {tensor:?} is in {shard:?}; it is in {}", found.display()),
                None => format!("it says that tensor {tensor:?} is in {shard:?}; it is not there"),
            };
            return Err(Error::invalid_format(index, message));
        }
    }
    if shards.is_empty() {
        return Err(Error::invalid_format(index, "it names no files"));
    }
    Ok((shards, places))
}

/// Some file of `folder` whose name pleases, for hints.
fn find(folder: &Path, pleases: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(&pleases))
}
