//! What the user sees: notes, headings, and one live line that is rewritten in
//! place on a terminal and printed line by line elsewhere.
//!
//! Colour only on a terminal, and never when `NO_COLOR` is set (no-color.org)
//! or `TERM` is `dumb`.

use std::io::{IsTerminal as _, Write};

/// The stream that human-readable text goes to.
pub(crate) struct Terminal {
    sink: Box<dyn Write>,
    is_terminal: bool,
    colour: bool,
    live_line: bool,
    columns: usize,
    /// Set when the reader has gone (closed pipe, hang-up): writing stops, work and clean-up go on.
    reader_gone: bool,
}

/// How a text is set off from the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// Headings.
    Bold,
    /// Success.
    Good,
    /// Failure.
    Bad,
    /// Something to notice.
    Warn,
    /// Details.
    Dim,
}

impl Terminal {
    /// Text on standard output, or on standard error when standard output is
    /// reserved for a JSON object.
    pub(crate) fn new(json: bool) -> Self {
        let is_terminal =
            if json { std::io::stderr().is_terminal() } else { std::io::stdout().is_terminal() };
        let width = if json {
            rustix::termios::tcgetwinsize(std::io::stderr())
        } else {
            rustix::termios::tcgetwinsize(std::io::stdout())
        };
        let columns = width.map_or(0, |size| usize::from(size.ws_col));
        let sink: Box<dyn Write> =
            if json { Box::new(std::io::stderr()) } else { Box::new(std::io::stdout()) };
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self::over(sink, is_terminal && !dumb, is_terminal && !dumb && !set("NO_COLOR"), columns)
    }

    fn over(sink: Box<dyn Write>, is_terminal: bool, colour: bool, columns: usize) -> Self {
        let columns = if columns == 0 { 80 } else { columns };
        Self { sink, is_terminal, colour, live_line: false, columns, reader_gone: false }
    }

    /// `text` in `tone`, when colours are on.
    pub(crate) fn paint(&self, tone: Tone, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let code = match tone {
            Tone::Bold => "1",
            Tone::Good => "32",
            Tone::Bad => "31",
            Tone::Warn => "33",
            Tone::Dim => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// One line.
    pub(crate) fn line(&mut self, text: &str) {
        self.end_live();
        self.write(&format!("{text}\n"));
    }

    /// A heading.
    pub(crate) fn heading(&mut self, text: &str) {
        let text = self.paint(Tone::Bold, text);
        self.line(&text);
    }

    /// Something that the user should notice.
    pub(crate) fn warn(&mut self, text: &str) {
        let label = self.paint(Tone::Warn, "note:");
        self.line(&format!("{label} {text}"));
    }

    /// Shows `text` as the present state; the next call replaces it on a
    /// terminal and adds a line elsewhere.
    pub(crate) fn live(&mut self, text: &str) {
        if self.is_terminal {
            let cut: String = text.chars().take(self.columns.saturating_sub(1)).collect();
            self.write(&format!("\r\x1b[2K{cut}"));
            self.live_line = true;
        } else {
            self.write(&format!("{text}\n"));
        }
    }

    /// Removes the live line of a terminal.
    pub(crate) fn end_live(&mut self) {
        if std::mem::take(&mut self.live_line) {
            self.write("\r\x1b[2K");
        }
    }

    fn write(&mut self, text: &str) {
        if self.reader_gone {
            return;
        }
        let written = self.sink.write_all(text.as_bytes()).and_then(|()| self.sink.flush());
        self.reader_gone = written.is_err();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.end_live();
    }
}

/// A bit rate for people: `7.61 Gbit/s`.
pub(crate) fn bit_rate(bps: f64) -> String {
    match bps {
        bps if bps >= 1e9 => format!("{:.2} Gbit/s", bps / 1e9),
        bps if bps >= 1e6 => format!("{:.1} Mbit/s", bps / 1e6),
        bps => format!("{:.0} kbit/s", bps / 1e3),
    }
}

/// A size for people, in binary units: `2.0 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let bytes = bytes as f64;
    match bytes {
        b if b >= KIB.powi(3) => format!("{:.1} GiB", b / KIB.powi(3)),
        b if b >= KIB.powi(2) => format!("{:.1} MiB", b / KIB.powi(2)),
        b if b >= KIB => format!("{:.1} KiB", b / KIB),
        b => format!("{b:.0} B"),
    }
}

/// A bar of `width` characters, filled by `done` of `total`.
pub(crate) fn bar(done: u64, total: u64, width: usize) -> String {
    let share = if total == 0 { 0.0 } else { (done as f64 / total as f64).min(1.0) };
    let filled = (share * width as f64) as usize;
    format!("[{}{}]", "#".repeat(filled), "-".repeat(width - filled))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    #[derive(Clone, Default)]
    struct Page(Rc<RefCell<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.borrow_mut().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Page {
        fn text(&self) -> String {
            String::from_utf8(self.0.borrow().clone()).unwrap()
        }
    }

    #[test]
    fn elsewhere_than_on_a_terminal_there_are_no_escapes() {
        let page = Page::default();
        let mut terminal = Terminal::over(Box::new(page.clone()), false, false, 0);
        terminal.heading("h");
        terminal.live("a");
        terminal.live("b");
        terminal.warn("w");
        drop(terminal);
        assert_eq!(page.text(), "h\na\nb\nnote: w\n");
    }

    #[test]
    fn a_terminal_rewrites_its_live_line_within_its_width() {
        let page = Page::default();
        let mut terminal = Terminal::over(Box::new(page.clone()), true, false, 5);
        terminal.live("abcdefgh");
        terminal.line("x");
        assert_eq!(page.text(), "\r\x1b[2Kabcd\r\x1b[2Kx\n");
    }

    #[test]
    fn colour_can_be_off_on_a_terminal() {
        let page = Page::default();
        assert_eq!(
            Terminal::over(Box::new(page.clone()), true, false, 5).paint(Tone::Good, "x"),
            "x"
        );
        let painted = Terminal::over(Box::new(page), true, true, 5).paint(Tone::Good, "x");
        assert_eq!(painted, "\x1b[32mx\x1b[0m");
    }

    #[test]
    fn units() {
        assert_eq!(bit_rate(7.614e9), "7.61 Gbit/s");
        assert_eq!(bit_rate(12.3e6), "12.3 Mbit/s");
        assert_eq!(size(2 << 30), "2.0 GiB");
        assert_eq!(size(5), "5 B");
        assert_eq!(bar(1, 2, 4), "[##--]");
        assert_eq!(bar(9, 2, 4), "[####]");
        assert_eq!(bar(0, 0, 2), "[--]");
    }
}
