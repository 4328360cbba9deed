//! Which tests ran over which datapath, and what became of them: one line per test that has a
//! case for more than one of them (`…::af_xdp`, `…::io_uring`, `…::socket`).

use std::collections::BTreeMap;

/// The columns: the last part of a test case's name.
const DATAPATHS: [&str; 3] = ["af_xdp", "io_uring", "socket"];

/// Verdicts by test and datapath.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Matrix {
    tests: BTreeMap<String, [Option<String>; DATAPATHS.len()]>,
}

impl Matrix {
    /// Adds what libtest says in `log`: `test faults::mtu::af_xdp ... ok`.
    pub(crate) fn add_log(&mut self, log: &str) {
        for line in log.lines() {
            let Some((case, verdict)) =
                line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
            else {
                continue;
            };
            let Some((test, datapath)) = case.rsplit_once("::") else { continue };
            let Some(column) = DATAPATHS.iter().position(|name| *name == datapath) else {
                continue;
            };
            let verdict = match verdict.trim() {
                "ok" => "passed",
                "FAILED" => "FAILED",
                _ => "left out",
            };
            self.tests.entry(test.to_owned()).or_default()[column] = Some(verdict.to_owned());
        }
    }

    /// The table with its heading; nothing when no test ran over several datapaths.
    pub(crate) fn lines(&self) -> Vec<String> {
        let several = self.tests.iter().filter(|(_, cells)| cells.iter().flatten().count() > 1);
        let row = |test: &str, cells: [&str; DATAPATHS.len()]| {
            let [first, second, third] = cells;
            format!("{test:<40} {first:<10} {second:<10} {third}")
        };
        let rows: Vec<String> = several
            .map(|(test, cells)| {
                row(test, std::array::from_fn(|column| cells[column].as_deref().unwrap_or("-")))
            })
            .collect();
        if rows.is_empty() {
            return rows;
        }
        std::iter::once(row("test over each datapath", DATAPATHS)).chain(rows).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_of_one_test_share_a_line() {
        let mut matrix = Matrix::default();
        matrix.add_log(
            "running 6 tests\n\
             test mtu_lowered::af_xdp ... ok\n\
             test mtu_lowered::socket ... FAILED\n\
             test only::socket ... ok\n\
             test choice::names ... ok\n\
             test result: ok. 3 passed\n",
        );
        matrix.add_log("test mtu_lowered::io_uring ... ignored, why\n");
        let lines = matrix.lines();
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].ends_with("socket"));
        assert_eq!(words(&lines[1]), ["mtu_lowered", "passed", "left", "out", "FAILED"]);
        assert!(Matrix::default().lines().is_empty());
    }
}
