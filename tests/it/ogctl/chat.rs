//! `ogctl chat`: with pipes at its ends, and in a real terminal.

use super::*;
use crate::common::bus::{Bus, Said};
use crate::common::node::skipped;

/// Runs a chat with these lines at its standard input.
async fn chat(bus: &Bus, args: &[&str], lines: &str) -> Said {
    let mut child = ogctl_on(bus, args).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all(lines.as_bytes()).await; // one that is refused is not read to its end
    drop(stdin);
    let out = tokio::time::timeout(LIMIT, child.wait_with_output()).await.expect("it ends").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = u8::try_from(out.status.code().expect("it exits by itself")).unwrap();
    Said { code, stdout: text(out.stdout), stderr: text(out.stderr) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_line_is_a_turn_and_knows_the_earlier_ones() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let said = chat(&bus, &["chat", "--system", "s", "--model", "m"], "hello world\n\nescape\nlast one\n").await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "hello world\nab\nlast one\n"), "{said:?}");
    assert_eq!(said.stderr.lines().filter(|line| line.starts_with("served by NodeA, echo")).count(), 3, "{said:?}");
    let call = daemon.last_prompt();
    assert_eq!(call.prompt, "last one");
    let messages =
        r#"Messages=[("user", "hello world"), ("assistant", "hello world"), ("user", "escape"), ("assistant", "a\u{1b}[31mb")]"#;
    assert_eq!(call.options, [messages, "Model=m", "System=s"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_steer_the_conversation() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let file = bus.dir().join("saved");
    let lines =
        format!("one\n/reset\n//two\n/model m\n/node n\n/system s\n/retry\n/model\n/save {}\n/quit\nnever\n", file.display());
    let said = chat(&bus, &["chat"], &lines).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "one\n/two\n/two\n"), "{said:?}");
    assert!(said.stderr.contains("model: m; there are: echo, llama3.2:3b"), "{said:?}");
    assert_eq!(daemon.last_prompt().options, ["Model=m", "Node=n", "System=s"], "after /reset there are no earlier messages");
    let saved = std::fs::read_to_string(&file).unwrap();
    assert_eq!(saved, "## system\n\ns\n\n## user\n\n/two\n\n## assistant\n\n/two\n\n");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = chat(&bus, &["chat"], &format!("/save {}\n", file.display())).await;
    assert!(again.code == exit::FAILED && again.stderr.contains("not there yet"), "{again:?}");
    for bad in ["/nonsense\n", "/retry\n", "/save\n"] {
        assert_eq!(chat(&bus, &["chat"], bad).await.code, exit::USAGE, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_that_fails_ends_a_script_and_json_is_an_object_a_turn() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    let said = chat(&bus, &["chat"], &format!("one\nstream {}\nnever\n", ErrorName::ContextOverflow)).await;
    assert_eq!((said.code, said.stdout.as_str()), (exit::USAGE, "one\nhalf\n"), "{said:?}");
    let said = chat(&bus, &["chat", "--json"], "one\ntwo\n").await;
    let texts: Vec<Value> = said.stdout.lines().map(|line| parse(line)["text"].clone()).collect();
    assert_eq!((texts, said.stderr.as_str()), (vec![json!("one"), json!("two")], ""));
    let long = "x".repeat((1 << 20) + 1);
    assert_eq!(chat(&bus, &["chat"], &long).await.code, exit::USAGE);
}

/// A terminal of 100 columns with a shell in it, by tmux.
struct Terminal {
    socket: std::path::PathBuf,
}

impl Terminal {
    /// `None`, said aloud, where there is no tmux.
    fn open(bus: &Bus) -> Option<Self> {
        let terminal = Self { socket: bus.dir().join("tmux") };
        let path = std::path::Path::new(env!("CARGO_BIN_EXE_ogctl")).parent().unwrap().display().to_string();
        let shell = format!(
            "PATH={path}:$PATH DBUS_SYSTEM_BUS_ADDRESS='{}' PS1='$ ' HOME={} exec sh -i",
            bus.address(),
            bus.dir().display()
        );
        match terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "40", &shell]) {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => {
                skipped(&format!("no tmux: {error}"));
                return None;
            }
        }
        Some(terminal)
    }

    fn tmux(&self, args: &[&str]) -> std::io::Result<std::process::Output> {
        let mut command = std::process::Command::new("tmux");
        command.env_remove("TMUX").env("LC_ALL", "C.UTF-8").arg("-u").arg("-S").arg(&self.socket).args(args).output()
    }

    fn screen(&self) -> String {
        String::from_utf8(self.tmux(&["capture-pane", "-p"]).unwrap().stdout).unwrap()
    }

    /// Types text, then a key such as `Enter` or `C-c`.
    fn keys(&self, text: &str, key: &str) {
        if !text.is_empty() {
            assert!(self.tmux(&["send-keys", "-l", text]).unwrap().status.success());
        }
        assert!(self.tmux(&["send-keys", key]).unwrap().status.success());
    }

    async fn until(&self, what: &str, wanted: impl Fn(&str) -> bool) {
        let deadline = std::time::Instant::now() + LIMIT;
        loop {
            let screen = self.screen();
            if wanted(&screen) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "never seen: {what}\n{screen}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

/// The editor waits for a line: the last line of the screen is its prompt.
fn asks(screen: &str) -> bool {
    screen.trim_end().ends_with("\n>")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_terminal_lines_are_edited_answers_stream_and_ctrl_c_stops_them() {
    let Some(bus) = bus_or_skip() else { return };
    let Some(terminal) = Terminal::open(&bus) else { return };
    let daemon = Fake::serve(&bus).await;
    terminal.keys("ogctl chat; echo code=$?", "Enter");
    terminal.until("the prompt", asks).await;
    // A word is taken back, the cursor goes home: the editor is at work.
    terminal.keys("world nonsense", "C-w");
    terminal.keys("", "C-a");
    terminal.keys("hello ", "Enter");
    terminal.until("the answer", |screen| screen.contains("\nhello world \n") || screen.contains("\nhello world\n")).await;
    terminal.until("who served it", |screen| screen.contains("served by NodeA, echo, 12 tokens") && asks(screen)).await;
    assert_eq!(daemon.last_prompt().prompt.trim(), "hello world");
    terminal.keys("escape", "Enter");
    terminal.until("text without its sequence", |screen| screen.contains("\nab\n") && asks(screen)).await;
    // Two lines that are pasted are one turn.
    assert!(terminal.tmux(&["set-buffer", "first line\nsecond line"]).unwrap().status.success());
    assert!(terminal.tmux(&["paste-buffer", "-p"]).unwrap().status.success());
    terminal.until("the paste", |screen| screen.contains("second line")).await;
    terminal.keys("", "Enter");
    daemon.wait_for(|seen| seen.prompt.prompt == "first line\nsecond line").await;
    terminal.until("the next prompt", |screen| screen.matches("served by").count() == 3 && asks(screen)).await;
    // What was asked before is one key away.
    // Up goes through the two lines of the last one first.
    for _ in 0..3 {
        terminal.keys("", "Up");
    }
    terminal.until("the question before", |screen| screen.trim_end().ends_with("> escape")).await;
    terminal.keys("", "C-u");

    terminal.keys("endless", "Enter");
    terminal.until("the stream", |screen| screen.contains("tick")).await;
    let begun = std::time::Instant::now();
    terminal.keys("", "C-c");
    daemon.wait_for(|seen| seen.closed_pipes == 1 && seen.calls.iter().any(|call| call == "Cancel")).await;
    assert!(begun.elapsed() < std::time::Duration::from_secs(3), "{:?}", begun.elapsed());
    terminal.until("that it was stopped", |screen| screen.contains("stopped; Ctrl-D leaves") && asks(screen)).await;
    // The turn that was stopped is not part of the conversation.
    terminal.keys("after", "Enter");
    daemon.wait_for(|seen| seen.prompt.prompt == "after").await;
    assert!(!daemon.last_prompt().options.iter().any(|option| option.contains("endless")));
    terminal.until("the next prompt", |screen| screen.contains("\nafter\n") && asks(screen)).await;
    terminal.keys("/nonsense", "Enter");
    terminal.until("what there is", |screen| screen.contains("/help") && asks(screen)).await;
    // Half a line is taken back; what is typed then is a turn of its own.
    let told = |screen: &str, times: usize| screen.matches("Ctrl-C again, or Ctrl-D, leaves").count() == times && asks(screen);
    terminal.keys("half a li", "C-c");
    terminal.until("that it was taken back", |screen| told(screen, 1)).await;
    terminal.keys("whole", "Enter");
    daemon.wait_for(|seen| seen.prompt.prompt == "whole").await;
    terminal.until("the next prompt", |screen| screen.contains("\nwhole\n") && asks(screen)).await;
    // Two in a row leave.
    terminal.keys("", "C-c");
    terminal.until("what leaves", |screen| told(screen, 2)).await;
    terminal.keys("", "C-c");
    terminal.until("the end", |screen| screen.contains("code=0")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_terminal_is_as_it_was_however_it_ends() {
    let Some(bus) = bus_or_skip() else { return };
    let Some(terminal) = Terminal::open(&bus) else { return };
    let _daemon = Fake::serve(&bus).await;
    let canonical = |screen: &str, number: usize| screen.contains(&format!("state{number}=icanon echo"));
    let state = "$(stty -a | grep -o ' icanon\\| echo ' | tr -d '\\n' | xargs)";
    terminal.keys(&format!("ogctl chat; echo code=$? state1={state}"), "Enter");
    terminal.until("the prompt", asks).await;
    terminal.keys("", "C-d");
    terminal.until("the terminal after Ctrl-D", |screen| screen.contains("code=0") && canonical(screen, 1)).await;
    terminal.keys("clear", "Enter");
    let line = format!("sh -c 'echo $$ > pid; exec ogctl chat' & fg; echo code=$? state2={state}");
    terminal.keys(&format!("cd {}", bus.dir().display()), "Enter");
    terminal.keys(&line, "Enter");
    terminal.until("the prompt", asks).await;
    let pid: i32 = std::fs::read_to_string(bus.dir().join("pid")).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::TERM).unwrap();
    terminal.until("the terminal after SIGTERM", |screen| screen.contains("code=143") && canonical(screen, 2)).await;
}
