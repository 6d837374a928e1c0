"""Steps of a server through the SGLang plug-in, compared with attention in float64."""

from __future__ import annotations

import torch

from support.fake_sglang import ForwardMode, make_step
from support.scalar_oracle import attention_of_request

#: Rows of req_to_token of the requests, and the tokens of each step: prefills, an extend over a
#: prefix, decodes, and a mixed step.
ROWS = [3, 1, 5]
STEPS = [("EXTEND", [7, 18, 1]), ("EXTEND", [5, 0, 3]), ("DECODE", [1, 1, 1]), ("MIXED", [4, 1, 1])]


def give_slots(runner, num_tokens, generator):
    """Random pages for num_tokens tokens of each request, never page 0."""
    page, table = runner.page_size, runner.req_to_token_pool.req_to_token
    pages = -(-num_tokens // page)
    order = 1 + torch.randperm(pages * len(ROWS), generator=generator)
    for row, own in zip(ROWS, order.view(len(ROWS), pages), strict=True):
        slots = (own[:, None] * page + torch.arange(page)).flatten()
        table[row, : len(slots)] = slots.int()


class Conversation:
    """Requests that grow: their keys and values as they were given, for the oracle."""

    def __init__(self, backend, runner, seed=0, modes=ForwardMode):
        self.backend, self.runner, self.modes = backend, runner, modes
        self.generator = torch.Generator().manual_seed(seed)
        self.blocks = list(runner.model.layers)
        self.past = [[[] for _ in ROWS] for _ in self.blocks]
        self.lens = [0] * len(ROWS)
        give_slots(runner, 48, self.generator)

    def step(self, mode, query_lens, **more):
        """(ForwardBatch, the new q, k, v of each layer) of the requests with new tokens."""
        chosen = [i for i, new in enumerate(query_lens) if new]
        for i in chosen:
            self.lens[i] += query_lens[i]
        batch = make_step(
            self.runner,
            self.modes[mode],
            [ROWS[i] for i in chosen],
            [self.lens[i] for i in chosen],
            [query_lens[i] for i in chosen],
            **more,
        )
        tensors = []
        for number, block in enumerate(self.blocks):
            layer, rows = block.attn, sum(query_lens)
            shapes = [
                (rows, layer.tp_q_head_num * layer.qk_head_dim),
                (rows, layer.tp_k_head_num, layer.qk_head_dim),
                (rows, layer.tp_k_head_num, layer.v_head_dim),
            ]
            q, k, v = (
                torch.randn(s, generator=self.generator).to(self.runner.dtype) for s in shapes
            )
            tensors.append((q, k, v))
            start = 0
            for i in chosen:
                end = start + query_lens[i]
                self.past[number][i].append((k[start:end], v[start:end]))
                start = end
        return batch, chosen, tensors

    def expected(self, number, chosen, query_lens, q, stored=lambda x: x, **semantics):
        """The output of a layer: (num_tokens, num_heads * head_size_v) float64."""
        layer, results, start = self.blocks[number].attn, [], 0
        for i in chosen:
            end = start + query_lens[i]
            keys, values = (torch.cat(parts) for parts in zip(*self.past[number][i], strict=True))
            query = q[start:end].view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            output, _ = attention_of_request(
                query, stored(keys), stored(values), scale=layer.scaling, **semantics
            )
            results.append(output.flatten(1))
            start = end
        return torch.cat(results)

    @torch.inference_mode()
    def run(self, semantics, stored=lambda x: x, kwargs=None):
        """Run all steps eagerly, as SGLang does; the largest error of each step and layer."""
        errors = []
        for mode, query_lens in STEPS:
            batch, chosen, tensors = self.step(mode, query_lens)
            self.backend.init_forward_metadata(batch)
            for number, (q, k, v) in enumerate(tensors):
                layer = self.blocks[number].attn
                more = {} if kwargs is None else kwargs[number]
                result = self.backend.forward(q, k, v, layer, batch, **more)
                want = self.expected(number, chosen, query_lens, q, stored, **semantics[number])
                errors.append(float((result.double() - want).abs().max()))
        return errors
