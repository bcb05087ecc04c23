//! A trace: what was speculated, selected, hit, missed and fetched, by step, layer and KV head.
//!
//! The file is little-endian: the bytes `KVATRACE`, then `u32` version (2), layers of the model, KV heads, 0. Then one record after
//! another: `u32` position of the step's token, `u16` layer, `u16` KV head, `u32` candidates (past tokens held), `u32` selected,
//! `u32` hits, `u32` misses, `u32` corrected; then the positions of the selected, of the missed and of the corrected tokens, ascending, as
//! `u32` each.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::{Error, ErrorCode, Result};

const MAGIC: &[u8; 8] = b"KVATRACE";
const VERSION: u32 = 2;

/// Writes a trace.
pub struct TraceWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

/// What one KV head of one layer did in one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Position of the step's token: the number of tokens before it.
    pub position: u32,
    /// Layer of the model.
    pub layer: u16,
    /// KV head.
    pub head: u16,
    /// Entries that could have been selected.
    pub candidates: u32,
    /// Positions of the tokens selected, ascending.
    pub selected: Vec<u32>,
    /// Those of them that were not on the device, ascending.
    pub missed: Vec<u32>,
    /// Those of the selected ones that a correction has added, ascending.
    pub corrected: Vec<u32>,
}

impl TraceWriter {
    /// Makes the file anew.
    pub fn create(path: &Path, layers: usize, kv_heads: usize) -> Result<TraceWriter> {
        let file = File::create(path).map_err(|error| Error::io(path, "make the trace file", &error))?;
        let mut writer = TraceWriter { path: path.to_owned(), file: BufWriter::with_capacity(1 << 20, file) };
        let header = [VERSION, layers as u32, kv_heads as u32, 0];
        let result = writer.file.write_all(MAGIC).and_then(|()| writer.words(&header));
        writer.checked(result)?;
        Ok(writer)
    }

    /// Adds a record.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let Record { selected, missed, corrected, .. } = record;
        let counts = [
            record.position,
            u32::from(record.layer) | u32::from(record.head) << 16,
            record.candidates,
            selected.len() as u32,
            (selected.len() - missed.len()) as u32,
            missed.len() as u32,
            corrected.len() as u32,
        ];
        let lists = [&counts[..], selected, missed, corrected];
        let result = lists.into_iter().try_for_each(|words| self.words(words));
        self.checked(result)
    }

    /// Hands everything to the operating system.
    pub fn flush(&mut self) -> Result<()> {
        let result = self.file.flush();
        self.checked(result)
    }

    fn words(&mut self, words: &[u32]) -> std::io::Result<()> {
        words.iter().try_for_each(|word| self.file.write_all(&word.to_le_bytes()))
    }

    fn checked(&self, result: std::io::Result<()>) -> Result<()> {
        result.map_err(|error| Error::io(&self.path, "write the trace", &error))
    }
}

/// Reads a trace, record by record.
pub struct TraceReader {
    path: PathBuf,
    file: BufReader<File>,
    layers: u32,
    kv_heads: u32,
}

impl TraceReader {
    /// Opens a trace.
    pub fn open(path: &Path) -> Result<TraceReader> {
        let file = File::open(path).map_err(|error| Error::io(path, "open the trace", &error))?;
        let mut reader = TraceReader { path: path.to_owned(), file: BufReader::new(file), layers: 0, kv_heads: 0 };
        let mut magic = [0; 8];
        reader.fill(&mut magic)?;
        let version = reader.word()?;
        if &magic != MAGIC || version != VERSION {
            return Err(reader.invalid("this is no trace of version 2"));
        }
        (reader.layers, reader.kv_heads) = (reader.word()?, reader.word()?);
        reader.word()?;
        Ok(reader)
    }

    /// Layers and KV heads of the model.
    pub fn shape(&self) -> (usize, usize) {
        (self.layers as usize, self.kv_heads as usize)
    }

    fn record(&mut self) -> Result<Option<Record>> {
        let mut first = [0; 4];
        if self.file.read(&mut first[..1]).map_err(|error| Error::io(&self.path, "read the trace", &error))? == 0 {
            return Ok(None);
        }
        self.fill(&mut first[1..])?;
        let place = self.word()?;
        let (candidates, selected, hits) = (self.word()?, self.word()?, self.word()?);
        let (missed, corrected) = (self.word()?, self.word()?);
        let (layer, head) = (place as u16, (place >> 16) as u16);
        let fits = selected <= candidates && hits.checked_add(missed) == Some(selected) && corrected <= selected;
        if !fits || u32::from(layer) >= self.layers || u32::from(head) >= self.kv_heads {
            return Err(self.invalid("a record's counts do not fit each other"));
        }
        // Grown by what is really there, so that a count of nonsense allocates nothing.
        let mut rows = |count: u32| (0..count).map(|_| self.word()).collect::<Result<Vec<u32>>>();
        let (selected, missed, corrected) = (rows(selected)?, rows(missed)?, rows(corrected)?);
        Ok(Some(Record { position: u32::from_le_bytes(first), layer, head, candidates, selected, missed, corrected }))
    }

    fn word(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact(bytes).map_err(|_| self.invalid("it ends within a record"))
    }

    fn invalid(&self, what: &str) -> Error {
        Error::new(ErrorCode::InvalidFormat, format!("{}: {what}", self.path.display()))
    }
}

impl Iterator for TraceReader {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        self.record().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        vec![
            Record {
                position: 900,
                layer: 2,
                head: 1,
                candidates: 900,
                selected: vec![4, 8, 77],
                missed: vec![8],
                corrected: vec![8, 77],
            },
            Record { position: 900, layer: 3, head: 0, candidates: 900, ..Record::default() },
        ]
    }

    #[test]
    fn what_is_written_is_read_and_a_cut_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        let mut writer = TraceWriter::create(&path, 4, 2).unwrap();
        records().iter().for_each(|record| writer.write(record).unwrap());
        writer.flush().unwrap();
        let reader = TraceReader::open(&path).unwrap();
        assert_eq!(reader.shape(), (4, 2));
        assert_eq!(reader.collect::<Result<Vec<_>>>().unwrap(), records());

        let bytes = std::fs::read(&path).unwrap();
        let ends = [24, 24 + 28 + 24, bytes.len()];
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let outcome = TraceReader::open(&path).and_then(|reader| reader.collect::<Result<Vec<_>>>());
            assert_eq!(outcome.is_ok(), ends.contains(&length), "cut to {length} bytes");
        }
        let mut nonsense = bytes.clone();
        nonsense[36..40].copy_from_slice(&u32::MAX.to_le_bytes());
        std::fs::write(&path, nonsense).unwrap();
        assert!(TraceReader::open(&path).unwrap().next().unwrap().is_err());
    }
}
