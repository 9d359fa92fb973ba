"""MiMo's chat format as a Jinja template, written so that transformers can run it too."""

from __future__ import annotations

DEFAULT_SYSTEM = "You are MiMo, a helpful AI assistant engineered by Xiaomi."

# ChatML without a line break after <|im_end|>. The first turn is always a system turn; every assistant
# turn carries a think block; results of tools in a row share one turn.
MIMO_TEMPLATE = (
    r"""
{%- macro other_fields(fields, known) -%}
    {%- for key, value in fields|items -%}
        {%- if key not in known -%}
            {{- '\n<' ~ key ~ '>' ~ (value if value is string else value|tojson) ~ '</' ~ key ~ '>' -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}

{%- macro text_of(content) -%}
    {%- for part in content or [] -%}
        {{- part.text -}}
    {%- endfor -%}
{%- endmacro -%}

{%- macro describe(tool) -%}
    {{- '\n<function>\n<name>' ~ tool.name ~ '</name>' -}}
    {%- if tool.description is defined -%}
        {{- '\n<description>' ~ tool.description|trim ~ '</description>' -}}
    {%- endif -%}
    {{- '\n<parameters>' -}}
    {%- set schema = tool.parameters if tool.parameters is mapping else {} -%}
    {%- if schema.properties is mapping -%}
        {%- for name, fields in schema.properties|items -%}
            {{- '\n<parameter>\n<name>' ~ name ~ '</name>' -}}
            {%- if fields is mapping -%}
                {%- if fields.type is defined -%}
                    {{- '\n<type>' ~ (fields.type if fields.type is string else fields.type|tojson) ~ '</type>' -}}
                {%- endif -%}
                {%- if fields.description is defined -%}
                    {{- '\n<description>' ~ fields.description|trim ~ '</description>' -}}
                {%- endif -%}
                {{- other_fields(fields, ['name', 'type', 'description']) -}}
            {%- endif -%}
            {{- '\n</parameter>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- other_fields(schema, ['type', 'properties']) -}}
    {{- '\n</parameters>' -}}
    {{- other_fields(tool, ['type', 'name', 'description', 'parameters']) -}}
    {{- '\n</function>' -}}
{%- endmacro -%}

{%- if messages and messages[0].role == 'system' -%}
    {%- set system = messages[0].content if messages[0].content is string else text_of(messages[0].content) -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '"""
    + DEFAULT_SYSTEM
    + r"""' -%}
    {%- set turns = messages -%}
{%- endif -%}

{{- '<|im_start|>system\n' ~ system -}}
{%- if tools -%}
    {{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You have access to the following functions:\n\n<tools>' -}}
    {%- for tool in tools -%}
        {{- describe(tool.function if tool.function is defined else tool) -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, output the function name and arguments in the following format:\n' -}}
    {{- '<tool_call>\n<function=example_function_name>\n' -}}
    {{- '<parameter=example_parameter_1>value_1</parameter>\n' -}}
    {{- '<parameter=example_parameter_2>This is the value for the second parameter\n' -}}
    {{- 'that can span\nmultiple lines</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\n' -}}
    {{- '- Function calls MUST follow the specified format: an inner <function=...></function> block ' -}}
    {{- 'must be nested within <tool_call></tool_call> XML tags\n' -}}
    {{- '- DO NOT use function calls inside <think></think> tags.\n' -}}
    {{- '- The value enclosed between parameter tags is preserved exactly as-is, ' -}}
    {{- 'including newlines and spaces.\n</IMPORTANT>' -}}
{%- endif -%}
{{- '<|im_end|>' -}}

{%- for message in turns -%}
    {%- set content = message.content if message.content is string else text_of(message.content) -%}
    {%- if message.role == 'assistant' -%}
        {%- set reasoning = message.reasoning_content or '' -%}
        {%- if not reasoning and content.startswith('<think>') and '</think>' in content -%}
            {%- set halves = content.removeprefix('<think>').split('</think>', 1) -%}
            {%- set reasoning = halves[0] -%}
            {%- set content = halves[1] -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\n<think>' ~ reasoning ~ '</think>' ~ content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function if call.function is defined else call -%}
            {{- '<tool_call>\n<function=' ~ function.name ~ '>\n' -}}
            {%- for key, value in function.arguments|items -%}
                {{- '<parameter=' ~ key ~ '>' ~ (value if value is string else value|tojson) ~ '</parameter>\n' -}}
            {%- endfor -%}
            {{- '</function>\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}
            {{- '<|im_start|>tool\n' -}}
        {%- endif -%}
        {{- '<tool_response>\n' ~ content ~ '\n</tool_response>\n' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}
            {{- '<|im_end|>' -}}
        {%- endif -%}
    {%- else -%}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>' -}}
    {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if not (enable_thinking is defined and enable_thinking) -%}
        {{- '<think></think>' -}}
    {%- endif -%}
{%- endif -%}
"""
)
