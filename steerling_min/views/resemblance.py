"""The third attribution, for people: the training chunks that a written text is most like."""

from collections.abc import Sequence
from pathlib import Path

from ..attribution import embed_chunks, present, resembling
from ..files.cli import printable
from ..files.labels import Labels
from ..files.tokenizer import Tokenizer
from ..model import Steerling
from ..training.data import first_stories, read_documents
from ..training.world import CONCEPTS


def texts_of_world(model: Steerling, steps: int = 30) -> list[str]:
    """The chunks of the first stories that the tiny model was trained on (`first_stories`).

    Raises ValueError for a model that has other concepts than the tiny world's.
    """
    if model.config.n_concepts != len(CONCEPTS):
        raise ValueError("--resembles: this model has not seen the tiny world; give the FILE that "
                         "it was trained on")
    return [chunk.text for story in first_stories(steps) for chunk in story]


def texts_of_file(file: Path) -> list[str]:
    """The chunks of a training text; of a plain text, which has one, its paragraphs.

    Raises ValueError or OSError, naming the file.
    """
    chunks = [chunk["text"] for document in read_documents(file) for chunk in document]
    return chunks if len(chunks) > 1 else [x for x in chunks[0].split("\n\n") if x.strip()]


def resemblances(model: Steerling, tokenizer: Tokenizer, labels: Labels, text: Sequence[int],
                 corpus: Sequence[str], n: int = 5) -> list[dict]:
    """For each chunk of a text its n nearest chunks in a corpus, ready for json.dumps:

    [{"text", "like": [{"text", "cosine", "shared": names of the known concepts that both have}]}]

    Resemblance is not cause: what the model wrote may have been learnt elsewhere.
    """
    chunks: list[list[int]] = [[]]
    for token in text:
        if token in (tokenizer.endofchunk_token_id, tokenizer.eos_token_id):
            chunks.append([])
        elif token not in tokenizer.special_ids:
            chunks[-1].append(token)
    chunks = [chunk for chunk in chunks if chunk]
    T = model.config.block_size  # what a longer chunk has beyond it is not embedded
    encoded = [tokenizer.encode(chunk)[:T] for chunk in corpus]
    index, found = embed_chunks(model, encoded), []
    for chunk, embedding in zip(chunks, embed_chunks(model, chunks)):
        ids, cosines = resembling(embedding, index, n)
        here, like = present(model, chunk), []
        for i, cosine in zip(ids.tolist(), cosines.tolist()):
            shared = sorted(here & present(model, encoded[i]))
            like.append({"text": corpus[i], "cosine": cosine,
                         "shared": [labels.name(concept) for concept in shared]})
        found.append({"text": tokenizer.decode(chunk), "like": like})
    return found


def print_resemblances(found: list[dict]) -> None:
    """Each chunk, and below it what it resembles, how much, and in which concepts."""
    print("what each chunk resembles in the training data (resemblance is not cause):")
    for chunk in found:
        print(f"\n{chunk['text'].strip()}")
        for other in chunk["like"]:
            print(f"  {other['cosine']:.2f}  {other['text']}\n        both: "
                  + (", ".join(map(printable, other["shared"])) or "no known concept"))
