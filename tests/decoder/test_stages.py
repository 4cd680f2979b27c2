"""The bookkeeping of a batch whose prompts are shortened by different numbers of tokens."""

import pytest
import torch

from llava.decoder.stages import PictureSpan, PromptRow, Stage, next_stage


@pytest.mark.parametrize(
    ("starts", "lengths", "ends_together"),
    [([0, 0], [6, 6], True), ([1, 0], [5, 6], True), ([0, 0], [4, 6], False)],
)
def test_padding_keeps_its_side_and_no_row_ends_early_where_none_did(starts, lengths, ends_together):
    """Prompts of equal length, or padded on the left, still end in the last column: what is generated comes there."""
    rows = [PromptRow(start, length, (PictureSpan(1, 3),)) for start, length in zip(starts, lengths, strict=True)]
    columns = torch.arange(6).expand(2, -1)
    valid = torch.stack([(row.start <= columns[0]) & (columns[0] < row.start + row.length) for row in rows])
    stage = Stage(0, rows, 6, valid, columns.clone(), columns.clone(), torch.zeros(2, 1, dtype=torch.int64))
    hidden = torch.arange(12.0).reshape(2, 6, 1)
    chosen = {(0, 0): (torch.tensor([0, 2]), None), (1, 0): (torch.tensor([1]), None)}
    shorter, states = next_stage(stage, 1, hidden, chosen, renumbers=False)
    assert [row.length for row in shorter.rows] == [lengths[0] - 1, lengths[1] - 2]
    ends = [row.start + row.length for row in shorter.rows]
    assert (set(ends) == {shorter.columns}) is ends_together
    for number, row in enumerate(shorter.rows):
        old, picture = rows[number], chosen[number, 0][0]
        kept = [0, *(1 + picture).tolist(), *range(4, old.length)]
        expected = hidden[number, torch.tensor(kept) + old.start]
        assert torch.equal(states[number, row.start : row.start + row.length], expected)
