"""The tasks of SuperGLUE: two sentences, a passage and a question, two meanings of a word."""

from smelt.evaluate.task_kinds import Row, Task

_JOINED = {"cause": "because", "effect": "so"}


def _premise(row: Row) -> str:
    return f"{row['premise'].strip().rstrip('.')} {_JOINED[row['question']]}"


def _uncapitalised(text: str) -> str:
    """The sentence as it goes on after another; "I" stays."""
    return text if text.startswith("I ") else text[:1].lower() + text[1:]


def _pronoun(row: Row) -> str:
    """Winograd's passage with the pronoun between stars, by the harness's own function."""
    from lm_eval.tasks.super_glue.wsc.preprocess_wsc import default_doc_to_text

    return str(default_doc_to_text({"text": row["text"], **row["target"]}))


def _candidates(record: Row) -> list[Row]:
    """Every answer of every question of a passage of MultiRC: each is right or wrong by itself."""
    return [
        {
            "paragraph": record["passage"]["text"],
            "question": asked["question"],
            "answer": answer["text"],
            "label": int(answer["label"]),
            "of": f"{record['idx']}-{asked['idx']}",
        }
        for asked in record["passage"]["questions"]
        for answer in asked["answers"]
    ]


SUPERGLUE: dict[str, Task] = {
    "copa": Task(
        split="validation",
        published=100,
        fields=("premise", "choice1", "choice2", "question", "label"),
        ask=_premise,
        choices=lambda row: [_uncapitalised(row["choice1"]), _uncapitalised(row["choice2"])],
        target=lambda row: int(row["label"]),
        examples="train",
    ),
    "boolq": Task(
        split="validation",
        published=3_270,
        fields=("passage", "question", "label"),
        ask=lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
        choices=lambda row: ["no", "yes"],
        target=lambda row: int(row["label"]),
        examples="train",
    ),
    "rte": Task(
        split="validation",
        published=277,
        fields=("premise", "hypothesis", "label"),
        ask=lambda row: f"{row['premise']}\nQuestion: {row['hypothesis']} True or False?\nAnswer:",
        choices=lambda row: ["True", "False"],
        target=lambda row: ("entailment", "not_entailment").index(row["label"]),
        examples="train",
    ),
    "cb": Task(
        split="validation",
        published=56,
        fields=("premise", "hypothesis", "label"),
        ask=lambda row: (
            f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?\nAnswer:"
        ),
        choices=lambda row: ["True", "False", "Neither"],
        target=lambda row: ("entailment", "contradiction", "neutral").index(row["label"]),
        metrics=("acc", "macro F1"),
        examples="train",
    ),
    "wsc": Task(
        split="validation",
        published=104,
        fields=("text", "target", "label"),
        ask=_pronoun,
        choices=lambda row: ["no", "yes"],
        target=lambda row: int(row["label"]),
        examples="train",
    ),
    "multirc": Task(
        split="validation",
        published=4_848,
        fields=("idx", "passage"),
        items=_candidates,
        group="of",
        ask=lambda row: f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer:",
        choices=lambda row: [
            f"{row['answer']}\nIs the answer correct? {said}" for said in ("no", "yes")
        ],
        target=lambda row: int(row["label"]),
        metrics=("F1 of answers", "exact match of questions", "acc"),
    ),
}
"""By name, which is also that of the folder."""
