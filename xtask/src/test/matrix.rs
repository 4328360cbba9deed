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
    /// Adds what libtest says in `log`: `test faults::mtu::af_xdp ... ok`. What a test writes while it
    /// runs may come between its name and its verdict, which then stands on a line of its own.
    pub(crate) fn add_log(&mut self, log: &str) {
        let mut open: Option<(String, usize)> = None;
        for line in log.lines() {
            let mut verdict = line.trim();
            let named = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
            if let Some((case, rest)) = named {
                open = case_of(case);
                verdict = rest.trim();
            }
            let verdict = match verdict {
                "ok" => "passed",
                "FAILED" => "FAILED",
                ignored if named.is_some() && ignored.starts_with("ignored") => "left out",
                _ => continue,
            };
            if let Some((test, column)) = open.take() {
                self.tests.entry(test).or_default()[column] = Some(verdict.to_owned());
            }
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

/// The test and the column of a case, if it has one.
fn case_of(case: &str) -> Option<(String, usize)> {
    let (test, datapath) = case.rsplit_once("::")?;
    let column = DATAPATHS.iter().position(|name| *name == datapath)?;
    Some((test.to_owned(), column))
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
             test mtu_lowered::socket ... a warning of a child\n\
             FAILED\n\
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
