"""Learning to Impute for a text model: keyword arguments in, labels through the whole transformer.

Documents of four topics, made up: a third of their words come from their topic's ten. Two of each are labeled.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta import L2I

TOPICS, WORDS, LENGTH, BATCH, SEEDS = 4, 60, 12, 32, (0, 1, 2)
Text = dict[str, Tensor]


class Model(nn.Module):
    """Embedding, one transformer block, mean over the words, one linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.fc = nn.Linear(width, TOPICS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the topics ``[N, 4]``."""
        h = self.block(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(-1)
        return self.fc((mask * h).sum(1) / mask.sum(1))


def documents(topics: Tensor) -> Text:
    """Words and mask ``[N, 12]``, of 6 to 12 words."""
    shape = len(topics), LENGTH
    own = 1 + 10 * topics.unsqueeze(1) + torch.randint(10, shape)
    words = torch.where(torch.rand(shape) < 0.35, own, torch.randint(1, WORDS, shape))
    mask = (torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (len(topics), 1))).long()
    return {"input_ids": words * mask, "attention_mask": mask}


def some_left_out(text: Text) -> Text:
    """Another view: without a third of the words."""
    kept = text["attention_mask"] * (torch.rand(text["input_ids"].shape) < 0.7)
    kept[:, 0] = 1
    return text | {"attention_mask": kept}


def train(meta: L2I | None, steps: int, seed: int) -> float:
    """Test accuracy in percent; without the method it is that of the model's own soft labels."""
    torch.manual_seed(seed)
    y_l, y_test = torch.arange(2 * TOPICS) % TOPICS, torch.arange(1000) % TOPICS
    x_l, x_test, x_all = documents(y_l), documents(y_test), documents(torch.arange(800) % TOPICS)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        places = torch.randint(800, (BATCH,))
        x_u = {name: value[places] for name, value in x_all.items()}
        view, labels = some_left_out(x_u), model(**x_u).softmax(1)  # labels on the graph, for the pull-back
        loss = functional.cross_entropy(model(**some_left_out(x_l)), y_l)
        loss = loss + (model(**view).softmax(1) - labels.detach()).square().sum(1).mean()
        if meta is not None:
            loss = loss + meta.refine(model=model, unlabeled=view, holdout=x_l, targets=y_l, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 100 * float((model.eval()(**x_test).argmax(1) == y_test).float().mean())


def main(steps: int = 120) -> float:
    """Trains with and without the method; returns the mean with it."""
    method = L2I(how="jvp", weight=1.0)
    before, after = (sum(train(meta, steps, seed) for seed in SEEDS) / len(SEEDS) for meta in (None, method))
    print(f"test accuracy, mean of {len(SEEDS)} seeds: own labels {before:.1f}%, with L2I {after:.1f}%")
    return after


if __name__ == "__main__":
    main()
