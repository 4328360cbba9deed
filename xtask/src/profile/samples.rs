//! What `perf script` prints, added up by process, category and function.

use std::collections::{BTreeMap, HashMap};

use super::category::Category;

/// The fields that [`Samples::parse`] reads: `perf script -F pid,period,ip,sym,dso`.
pub(crate) const FIELDS: &str = "pid,period,ip,sym,dso";

/// CPU time of one end, in nanoseconds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Spent {
    pub(crate) by_category: BTreeMap<Category, u64>,
    by_symbol: HashMap<String, u64>,
}

impl Spent {
    /// All of it.
    pub(crate) fn total_ns(&self) -> u64 {
        self.by_category.values().sum()
    }

    /// The `count` functions that took most, with their category.
    pub(crate) fn top(&self, count: usize) -> Vec<(&str, u64)> {
        let mut all: Vec<(&str, u64)> =
            self.by_symbol.iter().map(|(name, ns)| (name.as_str(), *ns)).collect();
        all.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        all.truncate(count);
        all
    }

    fn add(&mut self, category: Category, symbol: &str, ns: u64) {
        *self.by_category.entry(category).or_default() += ns;
        match self.by_symbol.get_mut(symbol) {
            Some(sum) => *sum += ns,
            None => drop(self.by_symbol.insert(symbol.to_owned(), ns)),
        }
    }
}

/// Samples of a whole machine.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    /// The end that sends the bulk.
    pub(crate) sender: Spent,
    /// The end that receives it.
    pub(crate) receiver: Spent,
    /// NAPI and softirq threads of the kernel, which work for both.
    pub(crate) kernel_threads: Spent,
    /// Lines that could not be read.
    pub(crate) unread: u64,
}

impl Samples {
    /// Reads the text; `is_kernel_thread` decides about processes that are neither end.
    pub(crate) fn parse(
        text: &str,
        sender: u32,
        receiver: u32,
        mut is_kernel_thread: impl FnMut(u32) -> bool,
    ) -> Self {
        let mut samples = Self::default();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let Some(sample) = Sample::parse(line) else {
                samples.unread += 1;
                continue;
            };
            let spent = match sample.pid {
                pid if pid == sender => &mut samples.sender,
                pid if pid == receiver => &mut samples.receiver,
                // The idle task.
                0 => continue,
                pid if is_kernel_thread(pid) => &mut samples.kernel_threads,
                _ => continue,
            };
            let category = Category::of(sample.symbol, sample.is_kernel);
            spent.add(category, sample.symbol, sample.ns);
        }
        samples
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Sample<'a> {
    pid: u32,
    ns: u64,
    symbol: &'a str,
    is_kernel: bool,
}

impl<'a> Sample<'a> {
    /// `  812     500250:  ffffffff81000000 udpv6_sendmsg ([kernel.kallsyms])`
    fn parse(line: &'a str) -> Option<Self> {
        let (pid, rest) = line.trim_start().split_once(char::is_whitespace)?;
        let (period, rest) = rest.trim_start().split_once(char::is_whitespace)?;
        let (ip, rest) = rest.trim_start().split_once(char::is_whitespace)?;
        let (symbol, object) = rest.trim_end().rsplit_once(" (")?;
        let object = object.strip_suffix(')')?;
        // The upper half of the address space is the kernel's, its BPF programs' too.
        let is_kernel = ip.len() == 16 && ip.starts_with("ffff");
        Some(Self {
            pid: pid.parse().ok()?,
            ns: period.trim_end_matches(':').parse().ok()?,
            symbol: match symbol.trim() {
                "" | "[unknown]" => object,
                symbol => symbol,
            },
            is_kernel,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
   812     500250:  ffffffff81a0b0c0 udpv6_sendmsg ([kernel.kallsyms])
   812     500250:      55d0c0ffee00 <bytes::bytes::Bytes as core::ops::drop::Drop>::drop (/t/stoq)
   813     400000:      7f00c0ffee00 __memmove_avx512_unaligned_erms (/usr/lib/libc.so.6)
   813     100000:      7f00c0ffee00 __memmove_avx512_unaligned_erms (/usr/lib/libc.so.6)
     0     500250:  ffffffff81a0b0c0 pv_native_safe_halt ([kernel.kallsyms])
    77     500250:  ffffffff81a0b0c0 veth_poll ([kernel.kallsyms])
    78     500250:      55d0c0ffee00 main (/usr/bin/other)
";

    #[test]
    fn each_sample_goes_to_its_end() {
        let samples = Samples::parse(TEXT, 812, 813, |pid| pid == 77);
        assert_eq!(samples.unread, 0);
        assert_eq!(samples.sender.total_ns(), 1_000_500);
        assert_eq!(samples.sender.by_category[&Category::KernelNetwork], 500_250);
        assert_eq!(samples.sender.by_category[&Category::Bytes], 500_250);
        assert_eq!(samples.receiver.by_category[&Category::Copies], 500_000);
        assert_eq!(samples.kernel_threads.total_ns(), 500_250);
        assert_eq!(samples.receiver.top(5), [("__memmove_avx512_unaligned_erms", 500_000)]);
    }

    #[test]
    fn what_cannot_be_read_is_counted() {
        let samples = Samples::parse("812 x\n\nWarning: lost chunks\n", 812, 813, |_| false);
        assert_eq!(samples.unread, 2);
        assert_eq!(samples.sender, Spent::default());
    }

    #[test]
    fn a_function_without_a_name_is_its_object() {
        let line = " 1  250000:  7f00c0ffee00  (/usr/lib/libIPSec_MB.so.1)";
        let sample = Sample::parse(line).unwrap();
        assert_eq!((sample.symbol, sample.is_kernel), ("/usr/lib/libIPSec_MB.so.1", false));
    }
}
