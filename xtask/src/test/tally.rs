//! Counting test cases.

/// Test cases by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Passed.
    pub(crate) passed: u64,
    /// Failed.
    pub(crate) failed: u64,
    /// Ignored, left out or not available.
    pub(crate) skipped: u64,
}

impl Tally {
    /// One case that passed or failed.
    pub(crate) fn one(passed: bool) -> Self {
        Self { passed: u64::from(passed), failed: u64::from(!passed), skipped: 0 }
    }

    /// One case that was left out.
    pub(crate) const SKIPPED: Self = Self { passed: 0, failed: 0, skipped: 1 };

    /// Sums the `test result:` lines of libtest in `output`, and the plain closing
    /// lines `N passed, M failed` of runners of their own. When the process
    /// failed without a line that says so (a crash, an abort), that is one failure.
    pub(crate) fn of_libtest(output: &str, success: bool) -> Self {
        let mut tally = Self::default();
        for line in output.lines() {
            if let Some(result) = line.strip_prefix("test result: ") {
                tally.add(Self::parse(result));
            } else if let Some(plain) = Self::parse_plain(line) {
                tally.add(plain);
            }
        }
        if !success && tally.failed == 0 {
            tally.failed = 1;
        }
        tally
    }

    /// Reads `ok. 3 passed; 0 failed; 1 ignored; 0 measured; …`.
    fn parse(result: &str) -> Self {
        let count = |word: &str| {
            result
                .split(['.', ';'])
                .filter_map(|part| part.trim().strip_suffix(word))
                .find_map(|number| number.trim().parse().ok())
                .unwrap_or(0)
        };
        Self { passed: count("passed"), failed: count("failed"), skipped: count("ignored") }
    }

    /// Reads a line that is `3 passed, 0 failed` or `3 passed, 0 failed, 1 skipped` and nothing else.
    fn parse_plain(line: &str) -> Option<Self> {
        let mut parts = line.split(", ");
        let mut count = |word: &str| parts.next()?.strip_suffix(word)?.parse().ok();
        let (passed, failed) = (count(" passed")?, count(" failed")?);
        let skipped = count(" skipped").unwrap_or(0);
        Some(Self { passed, failed, skipped })
    }

    /// Adds another tally.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_output_is_summed() {
        let output = "running 3 tests\n\
            test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s\n\
            noise: test result: ok. 99 passed\n\
            270 passed, 1 failed\n\
            nearly 7 passed, 0 failed\n\
            test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.5s\n";
        let tally = Tally::of_libtest(output, false);
        assert_eq!(tally, Tally { passed: 284, failed: 4, skipped: 1 });
    }

    #[test]
    fn a_crash_counts_as_a_failure() {
        assert_eq!(Tally::of_libtest("running 3 tests\n", false).failed, 1);
        assert_eq!(Tally::of_libtest("", true), Tally::default());
        let ok_line = "test result: ok. 1 passed; 0 failed; 0 ignored";
        assert_eq!(Tally::of_libtest(ok_line, false), Tally { passed: 1, failed: 1, skipped: 0 });
    }

    #[test]
    fn the_last_line() {
        assert_eq!(Tally { passed: 3, failed: 0, skipped: 0 }.to_string(), "3 passed, 0 failed");
        let tally = Tally { passed: 3, failed: 1, skipped: 2 };
        assert_eq!(tally.to_string(), "3 passed, 1 failed, 2 skipped");
    }
}
