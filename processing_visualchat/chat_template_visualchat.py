"""
The one instruction format (section 3 of arXiv 2309.14327), as the Jinja template that is saved with a processor.

    You are a powerful vision-language assistant.

    ### Image 1: <image>
    ### Question: please describe the image.
    ### Answer: It's a cute black cat.

    ### Image 2: <image>
    ### Image 3: <image>
    ### Question: What's the difference between the three cats?
    ### Answer: The colors of the three cats are different.

Images are numbered through the whole conversation, in the order of the content; a block may have a "number" of its
own, from which the count goes on, so that an image keeps its number when another is removed. One in the middle of a
question comes before it, and its number stands in its place: "### Question: Is Image 1 brighter than Image 2?". An
answer, with the space before it and its end-of-sequence token, is what the model learns to generate, unless its weight
is 0.
"""

SYSTEM_INSTRUCTION = "You are a powerful vision-language assistant."

CHAT_TEMPLATE = """\
{%- set state = namespace(images=0) -%}
{%- if messages and messages[0]["role"] == "system" -%}
    {%- set system = messages[0]["content"] -%}
    {{- system if system is string else system | map(attribute="text") | join("\\n") -}}
{%- else -%}
    {{- "SYSTEM_INSTRUCTION" -}}
{%- endif -%}
{%- for message in messages if message["role"] != "system" -%}
    {%- set content = message["content"] -%}
    {%- if content is string -%}
        {%- set content = [{"type": "text", "text": content}] -%}
    {%- endif -%}
    {%- if message["role"] == "user" -%}
        {{- "\\n\\n" -}}
        {%- set turn = namespace(before="", question=none, inside="", after="") -%}
        {%- for block in content -%}
            {%- if block["type"] == "image" -%}
                {%- set state.images = block["number"] or state.images + 1 -%}
                {%- set turn.after = turn.after ~ "### Image " ~ state.images ~ ": IMAGE_TOKEN\\n" -%}
                {%- set turn.inside = turn.inside ~ " Image " ~ state.images -%}
            {%- else -%}
                {%- if turn.question is none -%}
                    {%- set turn.question = block["text"] -%}
                {%- elif not turn.inside -%}
                    {%- set turn.question = turn.question ~ "\\n" ~ block["text"] -%}
                {%- else -%}
                    {%- set name = turn.inside[1:] if turn.question[-1:] in " \\n(" else turn.inside -%}
                    {%- set gap = "" if block["text"][:1] in " \\n.,:;!?)" else " " -%}
                    {%- set turn.question = turn.question ~ name ~ gap ~ block["text"] -%}
                {%- endif -%}
                {%- set turn.before = turn.before ~ turn.after -%}
                {%- set turn.inside = "" -%}
                {%- set turn.after = "" -%}
            {%- endif -%}
        {%- endfor -%}
        {{- turn.before -}}
        {{- "### Question: " ~ turn.question ~ "\\n" if turn.question is not none -}}
        {{- turn.after -}}
        {%- if add_generation_prompt and loop.last -%}
            {{- "### Answer:" -}}
        {%- endif -%}
    {%- else -%}
        {{- "### Answer:" -}}
        {%- set answer = " " ~ (content | map(attribute="text") | join("\\n")) ~ eos_token -%}
        {%- if 0 in (message["weight"], message["loss"]) -%}
            {{- answer -}}
        {%- else -%}
            {%- generation -%}{{- answer -}}{%- endgeneration -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
""".replace("SYSTEM_INSTRUCTION", SYSTEM_INSTRUCTION)


def chat_template(image_token: str) -> str:
    """The template with the placeholder of a processor in it."""
    return CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token)
