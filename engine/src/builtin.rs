//! The chat templates that most models use, and how a file's own is recognised as one of them.

/// One template.
#[derive(Debug)]
pub struct Builtin {
    /// As people call it.
    pub name: &'static str,
    /// Every group has one text, of those given, that is in the file's own template.
    marks: &'static [&'static [&'static str]],
    /// Texts that are not in it.
    not: &'static [&'static str],
    /// Jinja, with `messages`, `bos_token` and `eos_token`.
    pub source: &'static str,
    /// Texts that end an answer, where no token does.
    pub stops: &'static [&'static str],
}

/// The one whose marks the file's template has; else chatml where the vocabulary can say it, else the plain form.
pub fn recognise(file: &str, has_chatml: bool) -> &'static Builtin {
    let has = |marks: &&[&str]| marks.iter().any(|mark| file.contains(mark));
    let known = ALL.iter().find(|builtin| {
        !builtin.marks.is_empty() && builtin.marks.iter().all(has) && !builtin.not.iter().any(|mark| file.contains(mark))
    });
    known.unwrap_or(if has_chatml { &CHATML } else { &PLAIN })
}

/// All, the more particular first.
pub static ALL: &[Builtin] = &[
    Builtin {
        name: "phi4",
        marks: &[&["<|im_start|>"], &["<|im_sep|>"]],
        not: &[],
        source: "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant<|im_sep|>",
        stops: &[],
    },
    CHATML,
    Builtin {
        name: "mistral-v7",
        marks: &[&["[INST]"], &["[SYSTEM_PROMPT]"]],
        not: &[],
        source: "{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        stops: &[],
    },
    Builtin {
        name: "mistral-v1",
        marks: &[&["' [INST] ' + system_message"]],
        not: &[],
        source: "{% set ns = namespace(open=false) %}{% for m in messages %}{% if not ns.open %} [INST] {% set ns.open = true %}{% endif %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}{{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% set ns.open = false %}{% endif %}{% endfor %}",
        stops: &[],
    },
    Builtin {
        name: "mistral-v3-tekken",
        marks: &[&["[AVAILABLE_TOOLS]"], &["\"[INST]\""]],
        not: &[],
        source: "{% set ns = namespace(open=false) %}{% for m in messages %}{% if not ns.open %}[INST]{% set ns.open = true %}{% endif %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% set ns.open = false %}{% endif %}{% endfor %}",
        stops: &[],
    },
    Builtin {
        name: "mistral-v3",
        marks: &[&["[AVAILABLE_TOOLS]"]],
        not: &[],
        source: "{% set ns = namespace(open=false) %}{% for m in messages %}{% if not ns.open %}[INST] {% set ns.open = true %}{% endif %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% set ns.open = false %}{% endif %}{% endfor %}",
        stops: &[],
    },
    Builtin {
        name: "llama2",
        marks: &[&["[INST]"]],
        not: &[],
        // A system text alone opens the turn that the user's text closes.
        source: "{% set ns = namespace(open=false) %}{% for m in messages %}{% if not ns.open %}[INST] {% set ns.open = true %}{% endif %}{% if m.role == 'system' %}<<SYS>>\n{{ m.content }}\n<</SYS>>\n\n{% elif m.role == 'user' %}{{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% set ns.open = false %}{% endif %}{% endfor %}",
        stops: &[],
    },
    Builtin {
        name: "phi3",
        marks: &[&["<|assistant|>"], &["<|end|>"]],
        not: &[],
        source: "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n",
        stops: &[],
    },
    Builtin {
        name: "chatglm4",
        marks: &[&["[gMASK]<sop>"]],
        not: &[],
        source: "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>\n",
        stops: &[],
    },
    Builtin {
        name: "zephyr",
        marks: &[&["<|user|>"], &["eos_token", "<|endoftext|>", "</s>"]],
        not: &["<|tool_declare|>"],
        source: "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}<|assistant|>\n",
        stops: &[],
    },
    Builtin {
        name: "glm-edge",
        marks: &[&["<|user|>"], &["<|assistant|>"]],
        not: &["<|tool_declare|>"],
        source: "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>\n",
        stops: &[],
    },
    Builtin {
        name: "gemma",
        marks: &[&["<start_of_turn>"]],
        not: &[],
        source: "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = ns.system ~ (m.content | trim) ~ '\n\n' %}{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n{% if m.role == 'user' %}{{ ns.system }}{% set ns.system = '' %}{% endif %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}<start_of_turn>model\n",
        stops: &[],
    },
    Builtin {
        name: "openchat",
        marks: &[&["GPT4 Correct "]],
        not: &[],
        source: "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}<|end_of_turn|>{% else %}GPT4 Correct {{ m.role | capitalize }}: {{ m.content }}<|end_of_turn|>{% endif %}{% endfor %}GPT4 Correct Assistant:",
        stops: &[],
    },
    Builtin {
        name: "vicuna",
        marks: &[&["USER: "], &["ASSISTANT: "]],
        not: &[],
        source: "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}USER: {{ m.content }}\n{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}ASSISTANT:",
        stops: &["\nUSER:"],
    },
    Builtin {
        name: "deepseek-coder",
        marks: &[&["### Instruction:"], &["<|EOT|>"]],
        not: &[],
        source: "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n{% else %}### Response:\n{{ m.content }}\n<|EOT|>\n{% endif %}{% endfor %}### Response:\n",
        stops: &[],
    },
    Builtin {
        name: "command-r",
        marks: &[&["<|START_OF_TURN_TOKEN|>"], &["<|USER_TOKEN|>"]],
        not: &[],
        source: "{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}{{ m.content | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        stops: &[],
    },
    Builtin {
        name: "llama3",
        marks: &[&["<|start_header_id|>"], &["<|end_header_id|>"]],
        not: &[],
        source: "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n",
        stops: &[],
    },
    Builtin {
        name: "llama4",
        marks: &[&["<|header_start|>"], &["<|header_end|>"]],
        not: &[],
        source: "{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}<|header_start|>assistant<|header_end|>\n\n",
        stops: &[],
    },
    Builtin {
        name: "deepseek2",
        marks: &[&["'Assistant: ' + message['content'] + eos_token"]],
        not: &[],
        source: "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}User: {{ m.content }}\n\n{% else %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}Assistant:",
        stops: &[],
    },
    Builtin {
        name: "deepseek3",
        marks: &[&["<\u{ff5c}Assistant\u{ff5c}>"], &["<\u{ff5c}User\u{ff5c}>"]],
        not: &[],
        source: "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}<\u{ff5c}User\u{ff5c}>{{ m.content }}{% else %}<\u{ff5c}Assistant\u{ff5c}>{{ m.content }}<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>{% endif %}{% endfor %}<\u{ff5c}Assistant\u{ff5c}>",
        stops: &[],
    },
    Builtin {
        name: "exaone3",
        marks: &[&["[|system|]"], &["[|assistant|]"], &["[|endofturn|]"]],
        not: &[],
        source: "{% for m in messages %}[|{{ m.role }}|]{{ m.content | trim }}{% if m.role != 'user' %}[|endofturn|]{% endif %}\n{% endfor %}[|assistant|]",
        stops: &[],
    },
    Builtin {
        name: "granite",
        marks: &[&["<|start_of_role|>"]],
        not: &[],
        source: "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}<|start_of_role|>assistant<|end_of_role|>",
        stops: &[],
    },
    Builtin {
        name: "gpt-oss",
        marks: &[&["<|start|>"], &["<|channel|>"]],
        not: &[],
        source: "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}<|start|>assistant",
        stops: &[],
    },
    Builtin {
        name: "kimi-k2",
        marks: &[&["<|im_assistant|>assistant<|im_middle|>"]],
        not: &[],
        source: "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}<|im_assistant|>assistant<|im_middle|>",
        stops: &[],
    },
    Builtin {
        name: "seed-oss",
        marks: &[&["<seed:bos>"]],
        not: &[],
        source: "{% for m in messages %}<seed:bos>{{ m.role }}\n{{ m.content }}<seed:eos>{% endfor %}<seed:bos>assistant\n",
        stops: &[],
    },
    Builtin {
        name: "rwkv-world",
        marks: &[&["rwkv-world", "{{- 'User: ' + message['content']|trim + '\\n\\n' -}}"]],
        not: &[],
        source: "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content | trim }}\n\n{% endfor %}Assistant:",
        stops: &["\n\nUser:"],
    },
    PLAIN,
];

const CHATML: Builtin = Builtin {
    name: "chatml",
    marks: &[&["<|im_start|>"]],
    not: &["<end_of_utterance>"],
    source: "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    stops: &[],
};

const PLAIN: Builtin = Builtin {
    name: "plain",
    marks: &[],
    not: &[],
    source: "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% else %}{{ m.role | capitalize }}: {{ m.content }}\n{% endif %}{% endfor %}Assistant:",
    stops: &["\nUser:"],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_reached_by_its_own_marks() {
        for builtin in ALL.iter().filter(|builtin| !builtin.marks.is_empty()) {
            let file: String = builtin.marks.iter().map(|group| group[0]).collect::<Vec<_>>().join(" ");
            assert_eq!(recognise(&file, false).name, builtin.name);
        }
    }

    #[test]
    fn real_files_are_recognised() {
        let tinyllama = "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% endfor %}";
        assert_eq!(recognise(tinyllama, false).name, "zephyr");
        let qwen = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}";
        assert_eq!(recognise(qwen, true).name, "chatml");
        let phi3 = "{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n<|assistant|>\n'}}{% endif %}{% endfor %}";
        assert_eq!(recognise(phi3, false).name, "phi3");
        assert_eq!(recognise("", true).name, "chatml");
        assert_eq!(recognise("unheard of", false).name, "plain");
    }
}
