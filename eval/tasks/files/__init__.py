"""Tasks read from files in their published formats; where to get the files is the user's affair.

`path` is a file, or a folder with the suite's file names. Samples are the first `count` records in the file's order, or
all where there are fewer; with shuffle=True the seed draws which, and a larger count adds to a smaller one. `length` is
the prompt's tokens at most, chat template included. Each suite makes a prompt fit as it was published, and a prompt's
context, which is compressed before the question where the mode is "agnostic", ends where the table says.

| suite | the context ends after | a prompt that is too long |
| --- | --- | --- |
| longbench | the record's context, in the template | keeps its first and its last half |
| longbench_v2 | the document | keeps its first and its last half |
| infinitebench | the record's context (1) | keeps its first and its last half |
| ruler_jsonl | the line before the question, which is the input's last line | is refused: it was made for a length |
| longmemeval | the chat history | loses the history's end, its newest sessions |
| gsm8k | the worked examples | has fewer examples |
| mmlu | the worked examples, each subject its own | has fewer examples |
| humaneval | the last but one line of the prompt | is refused |

(1) In code_run and math_find the words before it name what is asked: "agnostic" does not hide all of the question.
"""
