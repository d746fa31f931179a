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

Images are numbered through the whole conversation, in the order of the content, which may interleave them with text.
An answer, with the space before it and its end-of-sequence token, is what the model learns to generate.
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
        {%- for block in content -%}
            {%- if block["type"] == "image" -%}
                {%- set state.images = state.images + 1 -%}
                {{- "### Image " ~ state.images ~ ": IMAGE_TOKEN\\n" -}}
            {%- elif loop.previtem is defined and loop.previtem["type"] == "text" -%}
                {{- block["text"] ~ "\\n" -}}
            {%- else -%}
                {{- "### Question: " ~ block["text"] ~ "\\n" -}}
            {%- endif -%}
        {%- endfor -%}
        {%- if add_generation_prompt and loop.last -%}
            {{- "### Answer:" -}}
        {%- endif -%}
    {%- else -%}
        {{- "### Answer:" -}}
        {%- generation -%}
            {{- " " ~ (content | map(attribute="text") | join("\\n")) ~ eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
""".replace("SYSTEM_INSTRUCTION", SYSTEM_INSTRUCTION)


def chat_template(image_token: str) -> str:
    """The template with the placeholder of a processor in it."""
    return CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token)
