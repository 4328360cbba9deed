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
    // A case that runs its own executable once more and prints what that said.
    let mut in_child = false;
    for line in log.lines() {
        let section = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"));
        let ends_child = section.is_some() || line.starts_with("$ ") || line.starts_with("xtask: ");
        in_child = in_section && !ends_child && (in_child || is_start_of_run(line));
        if in_child {
            failures.last_mut().expect("a section is open").said.push(line.to_owned());
            in_child = !line.starts_with("test result: ");
        } else if let Some(case) = section {
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

/// libtest's "running 1 test".
fn is_start_of_run(line: &str) -> bool {
    line.starts_with("running ") && (line.ends_with(" test") || line.ends_with(" tests"))
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
    fn what_a_child_said_belongs_to_the_case_that_ran_it() {
        let log = "---- soak stdout ----\n\
            thread 'soak' panicked at soak.rs:67:5:\n\
            \n\
            running 1 test\n\
            test child ... FAILED\n\
            \n\
            failures:\n\
            \n\
            test result: FAILED. 0 passed; 1 failed\n\
            thread 'child' panicked at soak.rs:9:1:\n\
            in vain\n\
            \n\
            failures:\n\
            test result: FAILED. 1 passed; 1 failed\n";
        let failures = of_log(log);
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].said.last().unwrap(), "in vain");
        // A child that was killed ends no later than the next case.
        let killed = "---- a stdout ----\nrunning 1 test\n---- b stdout ----\nout\n";
        let cases: Vec<_> = of_log(killed).into_iter().map(|each| (each.case, each.said)).collect();
        assert_eq!(cases[0], ("a".to_owned(), vec!["running 1 test".to_owned()]));
        assert_eq!(cases[1], ("b".to_owned(), vec!["out".to_owned()]));
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
