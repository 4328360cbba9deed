//! Which test cases of a step's log failed, and what each said: shown where the step fails and once more
//! at the end, because the log itself is gone with the machine that continuous integration ran on.

/// Lines of one failed case that are shown: its panic and what it had printed just before.
const LINES_MAX: usize = 30;
/// Failed cases that are shown with what they said.
const CASES_MAX: usize = 10;

/// A test case that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Its name, as libtest prints it; a command line for an executable that died without saying so.
    pub(crate) case: String,
    /// The last lines of what it said.
    pub(crate) said: Vec<String>,
}

/// The failed cases of `log`: libtest's sections `---- NAME stdout ----`, then the cases called FAILED
/// that have no section (they wrote past the capture), then executables that died.
pub(crate) fn of_log(log: &str) -> Vec<Failure> {
    let mut failures: Vec<Failure> = Vec::new();
    let (mut in_section, mut named) = (false, None);
    for line in log.lines() {
        let section = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"));
        if let Some(case) = section {
            failures.retain(|known| known.case != case || !known.said.is_empty());
            failures.push(Failure { case: case.to_owned(), said: Vec::new() });
            in_section = true;
        } else if line == "failures:" || line.starts_with("test result: ") || line.starts_with("$ ")
        {
            in_section = false;
        } else if let Some(said) = line.strip_prefix("xtask: ") {
            in_section = false;
            failures.push(Failure { case: said.to_owned(), said: Vec::new() });
        } else if in_section {
            failures.last_mut().expect("a section is open").said.push(line.to_owned());
        } else {
            let start = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
            if let Some((case, _)) = start {
                named = Some(case);
            }
            // What a case writes past the capture may stand between its name and its verdict.
            let verdict = start.map_or(line, |(_, verdict)| verdict);
            if verdict.trim_end().ends_with("FAILED")
                && let Some(case) = named.take()
            {
                failures.push(Failure { case: case.to_owned(), said: Vec::new() });
            }
        }
    }
    for failure in &mut failures {
        failure.said.retain(|line| !line.trim().is_empty());
        let drop = failure.said.len().saturating_sub(LINES_MAX);
        failure.said.drain(..drop);
    }
    failures
}

/// The lines that tell a reader what failed in a step.
pub(crate) fn lines(step: &str, failures: &[Failure]) -> Vec<String> {
    let mut lines = Vec::new();
    for (index, failure) in failures.iter().enumerate() {
        lines.push(format!("{step}: FAILED {}", failure.case));
        if index < CASES_MAX {
            lines.extend(failure.said.iter().map(|line| format!("    | {line}")));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "running 4 tests\n\
        test pool::warm ... ok\n\
        test pool::cold ... FAILED\n\
        test faults::mtu::socket ... a warning of a child\n\
        FAILED\n\
        \n\
        failures:\n\
        \n\
        ---- pool::cold stdout ----\n\
        seed 7\n\
        \n\
        thread 'pool::cold' panicked at engine/src/pool.rs:1:2:\n\
        left: 1\n\
        \n\
        failures:\n\
        \u{20}   pool::cold\n\
        \n\
        test result: FAILED. 1 passed; 2 failed; 0 ignored\n\
        xtask: /t/stoq-1 exited with 101\n";

    #[test]
    fn each_failed_case_is_named_once_with_what_it_said() {
        let failures = of_log(LOG);
        let cases: Vec<_> = failures.iter().map(|each| each.case.as_str()).collect();
        assert_eq!(cases, ["faults::mtu::socket", "pool::cold", "/t/stoq-1 exited with 101"]);
        assert_eq!(
            failures[1].said,
            ["seed 7", "thread 'pool::cold' panicked at engine/src/pool.rs:1:2:", "left: 1"]
        );
    }

    #[test]
    fn a_good_log_has_none() {
        assert_eq!(of_log("running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed\n"), []);
        assert_eq!(of_log(""), []);
    }

    #[test]
    fn a_flood_is_cut_at_its_beginning() {
        let flood: String = (0..100).map(|line| format!("line {line}\n")).collect();
        let failures = of_log(&format!("---- noisy stdout ----\n{flood}"));
        assert_eq!(failures[0].said.len(), LINES_MAX);
        assert_eq!(failures[0].said.last().unwrap(), "line 99");
        assert_eq!(lines("unit", &failures)[0], "unit: FAILED noisy");
    }
}
