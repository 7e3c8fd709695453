//! From a conversation to the text that the model was trained on.
//!
//! A file's own template is a program. By default it is only looked at: its marks say which of the list here it means. With
//! `file_template` it runs, with a bound on its steps and its output and no way to load anything.

use std::io;

use minijinja::{Environment, ErrorKind, Value, context};
use opengateway_engine_protocol::Message;

use crate::builtin::{self, Builtin};

/// Steps of a template; the longest conversation takes some per message.
const FUEL: u64 = 2_000_000;
/// Output of a template beyond the messages themselves, for each message and once.
const MARKS_PER_MESSAGE: usize = 16 << 10;
const NAME: &str = "chat";

/// Renders conversations.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    name: String,
    begin: String,
    end: String,
    stops: &'static [&'static str],
}

/// What the model says about its template.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The template in the file.
    pub file: Option<&'a str>,
    /// Text of the token that begins a text; empty where there is none.
    pub begin: String,
    /// Text of the token that ends it.
    pub end: String,
    /// Whether the vocabulary has the marks of chatml.
    pub has_chatml: bool,
}

impl Template {
    /// One of the list, by the marks of the file's own.
    pub fn builtin(facts: Facts<'_>) -> Result<Self, String> {
        let chosen = builtin::recognise(facts.file.unwrap_or_default(), facts.has_chatml);
        let Builtin { name, source, stops, .. } = chosen;
        Self::new(exact(), (*source).to_owned(), (*name).to_owned(), stops, facts.begin, facts.end)
    }

    /// The file's own.
    ///
    /// # Errors
    /// A sentence: there is none, it cannot be read, or it cannot render a plain question.
    pub fn of_file(facts: Facts<'_>) -> Result<Self, String> {
        let source = facts.file.ok_or("the file has no chat template; set file_template = false")?.to_owned();
        let mut environment = Environment::new();
        // As those expect who write templates into files.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let template = Self::new(environment, source, "the file's own".to_owned(), &[], facts.begin, facts.end)?;
        let question = Message { role: "user".to_owned(), text: "Hello".to_owned() };
        template.render(&[question]).map_err(|error| format!("{error}; set file_template = false"))?;
        Ok(template)
    }

    fn new(
        mut environment: Environment<'static>,
        source: String,
        name: String,
        stops: &'static [&'static str],
        begin: String,
        end: String,
    ) -> Result<Self, String> {
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(64);
        environment.add_function("raise_exception", |_: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, "the template refuses this conversation"))
        });
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| format!("the chat template cannot be read: {}", place(&error)))?;
        Ok(Self { environment, name, begin, end, stops })
    }

    /// For people, such as "chatml".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Texts that end an answer although no token does.
    pub fn stops(&self) -> &'static [&'static str] {
        self.stops
    }

    /// The conversation as text, ready for the answer to be added.
    ///
    /// # Errors
    /// A sentence without any of the text.
    pub fn render(&self, messages: &[Message]) -> Result<String, String> {
        if let Some(message) = messages.iter().find(|message| !matches!(message.role.as_str(), "system" | "user" | "assistant")) {
            let role: String = message.role.chars().filter(|sign| sign.is_ascii_alphanumeric()).take(20).collect();
            return Err(format!("a message has the role \"{role}\"; there are system, user and assistant"));
        }
        let texts: usize = messages.iter().map(|message| message.text.len()).sum();
        // A template may write the system text into each message, not more.
        let limit = texts * 2 + (messages.len() + 1) * MARKS_PER_MESSAGE;
        let messages: Vec<_> =
            messages.iter().map(|message| context! { role => message.role, content => message.text }).collect();
        let variables = context! {
            messages, add_generation_prompt => true, bos_token => self.begin, eos_token => self.end,
            pad_token => "", unk_token => "",
        };
        let template = self.environment.get_template(NAME).map_err(|error| place(&error))?;
        let mut output = Bounded { bytes: Vec::new(), limit };
        template
            .render_captured_to(variables, &mut output)
            .map_err(|error| format!("the chat template failed: {}", place(&error)))?;
        String::from_utf8(output.bytes).map_err(|_| "the chat template wrote no text".to_owned())
    }
}

/// Every character of the template counts.
fn exact() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_keep_trailing_newline(true);
    environment
}

/// Kind and line of an error: its detail may quote a message.
fn place(error: &minijinja::Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".to_owned(),
        ErrorKind::WriteFailure => "it writes too much".to_owned(),
        kind => format!("{kind} (line {})", error.line().unwrap_or(0)),
    }
}

/// A writer that fails rather than grow without end.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other("too much"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(file: Option<&str>) -> Facts<'_> {
        Facts { file, begin: "<s>".to_owned(), end: "</s>".to_owned(), has_chatml: false }
    }

    fn message(role: &str, text: &str) -> Message {
        Message { role: role.to_owned(), text: text.to_owned() }
    }

    fn talk() -> Vec<Message> {
        vec![message("system", "Be brief."), message("user", "Hi"), message("assistant", "Yes?"), message("user", "2+2")]
    }

    fn rendered(file: &str) -> (String, String) {
        let template = Template::builtin(facts(Some(file))).unwrap();
        (template.name().to_owned(), template.render(&talk()).unwrap())
    }

    #[test]
    fn templates_are_known_by_their_marks() {
        let (name, text) = rendered("{{ '<|im_start|>' + message['role'] }}");
        assert_eq!(name, "chatml");
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n\
             <|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
        );
        let (name, text) = rendered("<|start_header_id|> <|end_header_id|>");
        assert_eq!(name, "llama3");
        assert!(
            text.starts_with("<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"),
            "{text}"
        );
        assert!(text.ends_with("2+2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"), "{text}");
        let (name, text) = rendered("[INST] <<SYS>>");
        assert_eq!(name, "llama2");
        assert_eq!(text, "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]Yes?</s>[INST] 2+2 [/INST]");
        let (name, text) = rendered("<start_of_turn>");
        assert_eq!(name, "gemma");
        assert_eq!(
            text,
            "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n\
             <start_of_turn>user\n2+2<end_of_turn>\n<start_of_turn>model\n"
        );
    }

    #[test]
    fn a_model_without_a_template_gets_a_plain_form_or_chatml() {
        let template = Template::builtin(facts(None)).unwrap();
        assert_eq!(template.name(), "plain");
        assert_eq!(template.render(&talk()).unwrap(), "Be brief.\n\nUser: Hi\nAssistant: Yes?\nUser: 2+2\nAssistant:");
        assert_eq!(template.stops(), ["\nUser:"]);
        let template = Template::builtin(Facts { has_chatml: true, ..facts(Some("no marks")) }).unwrap();
        assert_eq!(template.name(), "chatml");
    }

    #[test]
    fn every_builtin_renders_what_was_said_and_asks_for_an_answer() {
        for builtin in builtin::ALL {
            let template = Template::new(
                exact(),
                builtin.source.to_owned(),
                builtin.name.to_owned(),
                builtin.stops,
                "<s>".to_owned(),
                "</s>".to_owned(),
            )
            .unwrap_or_else(|error| panic!("{}: {error}", builtin.name));
            let text = template.render(&talk()).unwrap();
            let places: Vec<_> = ["Be brief.", "Hi", "Yes?", "2+2"].iter().map(|said| text.find(said)).collect();
            assert!(places.iter().all(Option::is_some), "{}: {text}", builtin.name);
            assert!(places.is_sorted(), "{}: {text}", builtin.name);
            let question = text.rfind("2+2").unwrap() + 3;
            assert!(text.len() > question, "{}: nothing asks for the answer", builtin.name);
            assert!(!text.contains("{{") && !text.contains("{%"), "{}: {text}", builtin.name);
            // The beginning of text is a token; it is not written.
            assert!(!text.starts_with("<s>"), "{}: {text}", builtin.name);
            // A question alone, and one that has marks of Jinja in it.
            let alone = template.render(&[message("user", "{{ 7*6 }}")]).unwrap();
            assert!(alone.contains("{{ 7*6 }}"), "{}: {alone}", builtin.name);
        }
    }

    #[test]
    fn other_roles_are_refused_without_quoting_more_than_their_name() {
        let template = Template::builtin(facts(None)).unwrap();
        let error = template.render(&[message("tool\n\u{1b}[31m", "canary")]).unwrap_err();
        assert!(error.contains("\"tool31m\"") && !error.contains("canary"), "{error}");
    }

    #[test]
    fn a_files_own_template_runs_bounded() {
        let own = |source: &'static str| Template::of_file(facts(Some(source)));
        let template = own("{{ bos_token }}{% for m in messages %}{{ m['content'].strip() | upper }}{% endfor %}").unwrap();
        assert_eq!(template.render(&[message("user", " hi ")]).unwrap(), "<s>HI");
        for (source, why) in [
            ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "too many steps"),
            ("{% for a in range(99999) %}{{ messages[0]['content'] * 9999 }}{% endfor %}", "too much"),
            ("{% include '/etc/passwd' %}", "failed"),
            ("{{ raise_exception('no') }}", "failed"),
            ("{% for %}", "cannot be read"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed"),
        ] {
            let error = own(source).unwrap_err();
            assert!(error.contains(why), "{source}: {error}");
        }
        assert!(Template::of_file(facts(None)).is_err());
    }

    #[test]
    fn an_error_quotes_no_message() {
        let template = Template::of_file(facts(Some(
            "{% if messages[0]['content'] == 'Hello' %}x{% else %}{{ messages[0]['content'] / 2 }}{% endif %}",
        )));
        let error = template.unwrap().render(&[message("user", "canary")]).unwrap_err();
        assert!(!error.contains("canary"), "{error}");
    }
}
