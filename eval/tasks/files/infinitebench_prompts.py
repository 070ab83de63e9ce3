"""InfiniteBench's prompts for open models and its output limits, to the letter (Zhang et al. 2024)."""

# ruff: noqa: RUF001 (the Chinese marks are what is meant)

_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"
_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"

PROMPTS = {
    "passkey": (
        f"{_HIDDEN} and memorize it. I will quiz you about the important information.\n\n{{context}}\n\n{{input}}\n\n"
        "The pass key is"
    ),
    "number_string": (
        f"{_HIDDEN}. I will quiz you about the important information there.\n\n{{context}}\n\n{{input}}\n\n"
        "The sequence of digits is"
    ),
    "kv_retrieval": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}"
    ),
    "longbook_sum_eng": "Summarize the book below.\n\n{context}\n\nSummary:",
    "longbook_choice_eng": (
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n"
        f"{_OPTIONS}The letter of the correct answer is"
    ),
    "longbook_qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: {input}\n"
        "Answer:"
    ),
    "longbook_qa_chn": "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：",
    "longdialogue_qa_eng": (
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and '
        "you should try to guess who that character is.\n\n{context}\n\nThe name that has been replaced with $$MASK$$ "
        "is likely"
    ),
    "math_find": "What is {what} in the following list?\n\n{context}\n\n{input}",
    "math_calc": (
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\nValues:"
    ),
    "code_run": (
        "There is a function called {function} in the following Python code.\n\n{context}\n\nPlease compute the exact "
        "value of {call}. The value of {call} is"
    ),
    "code_debug": (
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        f"crash.\n\n{{context}}\n\nOptions:\n{_OPTIONS}The correct option is:"
    ),
}

NEW_TOKENS = {
    "passkey": 6, "number_string": 12, "kv_retrieval": 50, "longbook_sum_eng": 1200, "longbook_choice_eng": 40,
    "longbook_qa_eng": 40, "longbook_qa_chn": 40, "longdialogue_qa_eng": 40, "math_find": 3, "math_calc": 30000,
    "code_run": 5, "code_debug": 5,
}  # fmt: skip
