//! How much host memory may still be had. Pinned memory is never swapped out, and the kernel gives out more than there is: who
//! pins too much is not refused but killed.

use std::fs::read_to_string;
use std::path::Path;

/// Bytes that this process may still take, as far as the system says: what is free or can be freed without swapping, and
/// what its control groups (versions 1 and 2, and those around them) leave.
pub(super) fn available() -> Option<usize> {
    let machine = field(&read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:").map(|kib| kib << 10);
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    groups.lines().filter_map(|line| left_by(line, Path::new("/sys/fs/cgroup"))).chain(machine).min()
}

/// What the group on a line of `/proc/self/cgroup` leaves, and those around it, of a hierarchy mounted below `mounted`.
fn left_by(line: &str, mounted: &Path) -> Option<usize> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let (root, limit, usage, cached) = match controllers {
        "" => (mounted.to_path_buf(), "memory.max", "memory.current", ["inactive_file", "active_file"]),
        _ if controllers.split(',').any(|controller| controller == "memory") => (
            mounted.join("memory"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ["total_inactive_file", "total_active_file"],
        ),
        _ => return None,
    };
    // Inside a container the path may be one that is not seen from there: then there is the root.
    let own = root.join(path.trim_start_matches('/'));
    let groups = own.ancestors().take_while(|group| group.starts_with(&root));
    let left = groups.filter_map(|group| {
        let number = |file| read_to_string(group.join(file)).ok()?.trim().parse::<usize>().ok();
        let (limit, usage) = (number(limit)?, number(usage)?);
        // Pages of files give way.
        let stat = read_to_string(group.join("memory.stat")).unwrap_or_default();
        let cached: usize = cached.iter().filter_map(|name| field(&stat, name)).sum();
        Some(limit.saturating_sub(usage.saturating_sub(cached)))
    });
    left.min()
}

/// The number behind a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<usize> {
    let mut lines = text.lines().map(str::split_whitespace);
    lines.find_map(|mut words| if words.next() == Some(name) { words.next()?.parse().ok() } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes files of a group.
    fn group(folder: &Path, files: &[(&str, &str)]) {
        std::fs::create_dir_all(folder).unwrap();
        for (name, text) in files {
            std::fs::write(folder.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_group_counts_and_cached_files_do_not() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        group(&root.join("a"), &[("memory.max", "1000\n"), ("memory.current", "900\n")]);
        let stat = "anon 1\ninactive_file 40\nactive_file 10\n";
        group(&root.join("a/b"), &[("memory.max", "500\n"), ("memory.current", "450\n"), ("memory.stat", stat)]);
        group(&root.join("a/b/c"), &[("memory.max", "max\n"), ("memory.current", "450\n")]);
        assert_eq!(left_by("0::/a/b/c", root), Some(100), "of a/b; a leaves as much");
        assert_eq!(left_by("0::/a", root), Some(100));
        assert_eq!(left_by("0::/elsewhere", root), None, "nothing is limited there");
        assert_eq!(left_by("3:cpuset:/a", root), None);
        assert_eq!(left_by("nonsense", root), None);

        let files = [
            ("memory.limit_in_bytes", "700"),
            ("memory.usage_in_bytes", "600"),
            ("memory.stat", "total_active_file 7"),
        ];
        group(&root.join("memory/x"), &files);
        assert_eq!(left_by("4:cpu,memory:/x/y", root), Some(107), "that around it");
        assert_eq!(left_by("4:cpu,memory:/z", root), None);
    }

    #[test]
    fn this_machine_has_some() {
        assert!(available().is_none_or(|bytes| bytes > 1 << 20));
    }
}
