// The same request for other programs: curl, the openai package, the keys of a recipe. Nothing here touches the page.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for a shell

export const curl = (origin, body, hasKey) => [
  `curl -N ${origin}/v1/chat/completions`,
  "-H 'Content-Type: application/json'",
  ...(hasKey ? ['-H "Authorization: Bearer $FRANKENMOE_API_KEY"'] : []),
  `-d ${quoted(JSON.stringify({ ...body, stream: true }, null, 2))}`,
].join(" \\\n  ");

const EXTENSIONS = ["experts_per_token", "disable_experts", "expert_bias"];

// JSON's strings, numbers, lists and dictionaries are Python's too; a request has nothing else
export const python = (origin, body, hasKey) => {
  const own = Object.fromEntries(Object.entries(body).filter(([name]) => EXTENSIONS.includes(name)));
  const common = Object.entries(body).filter(([name]) => !EXTENSIONS.includes(name));
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${hasKey ? 'os.environ["FRANKENMOE_API_KEY"]' : '"none"'})
stream = client.chat.completions.create(
${common.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`).join("\n")}
    stream=True,${Object.keys(own).length ? `\n    extra_body=${JSON.stringify(own)},` : ""}
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
`;
};

// what a recipe can say of the routing; a JSON string is a YAML string
export const recipe = ({ experts, prompts, experts_per_token: usual }, { experts_per_token: count = usual, disable_experts: off = [], expert_bias: bias = {} }) => {
  const text = [`experts_per_token: ${count}`, "experts:"];
  for (const name of experts.filter((each) => !off.includes(each))) {
    text.push(`- name: ${JSON.stringify(name)}`);
    for (const kind of ["positive", "negative"]) {
      const given = prompts?.[name]?.[kind] ?? [];
      if (given.length) text.push(`  ${kind}_prompts:`, ...given.map((prompt) => `  - ${JSON.stringify(prompt)}`));
    }
    if (bias[name]) text.push(`  # ${bias[name]} on its score: a request can say it (expert_bias), a recipe cannot`);
  }
  if (off.length) text.push(`# left out: ${off.map((name) => JSON.stringify(name)).join(", ")}`);
  return `${text.join("\n")}\n`;
};
