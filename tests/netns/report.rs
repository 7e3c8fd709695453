//! Tables of what was measured, in Markdown, on standard error. `scripts/lab.sh` puts tables of one title together.

/// A table that several tests may have rows in.
#[derive(Debug)]
pub struct Table {
    pub title: &'static str,
    pub head: &'static [&'static str],
}

impl Table {
    /// Prints rows under the title, all at once: other tests print too.
    pub fn print(&self, rows: &[Vec<String>]) {
        let mut lines = vec![format!("### {}", self.title), self.line(self.head), self.line(&vec!["---"; self.head.len()])];
        lines.extend(rows.iter().map(|row| self.line(row)));
        eprintln!("\n{}\n", lines.join("\n"));
    }

    pub fn row(&self, cells: Vec<String>) {
        self.print(&[cells]);
    }

    fn line(&self, cells: &[impl AsRef<str>]) -> String {
        assert_eq!(cells.len(), self.head.len(), "cells of a row of {:?}", self.title);
        let cells: Vec<&str> = cells.iter().map(AsRef::as_ref).collect();
        format!("| {} |", cells.join(" | "))
    }
}

/// Whether the long proofs are wanted: `scripts/lab.sh` sets this. Says so where they are not.
pub fn long() -> bool {
    let wanted = std::env::var_os("OPENGATEWAY_LAB").is_some_and(|value| value == "long");
    if !wanted {
        eprintln!("not run here: a long proof; scripts/lab.sh runs it");
    }
    wanted
}
