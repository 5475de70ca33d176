from types import SimpleNamespace

from vllm_kvpress.evaluation.observe import observe

NULL = SimpleNamespace(is_null=True)
BLOCK = SimpleNamespace(is_null=False)


class Scheduler:
    """Two requests, one lane each of staging and store, and no preemption."""

    def __init__(self):
        self.lanes = [SimpleNamespace(req_to_blocks={}) for _ in range(2)]
        self.kv_cache_manager = SimpleNamespace(
            coordinator=SimpleNamespace(single_type_managers=self.lanes),
            block_pool=SimpleNamespace(get_num_free_blocks=lambda: 90),
        )
        self.requests = {}
        self.running = []

    def schedule(self, tokens):
        for request_id, count in tokens.items():
            self.requests[request_id].num_computed_tokens += count
        return SimpleNamespace(num_scheduled_tokens=tokens, preempted_req_ids=None)

    def add(self, request_id, prompt):
        request = SimpleNamespace(
            request_id=request_id, num_prompt_tokens=prompt, num_computed_tokens=0
        )
        self.requests[request_id] = request
        self.running.append(request)


def test_blocks_of_all_lanes_count_and_null_blocks_do_not():
    scheduler = Scheduler()
    scheduler.add("a", 100)
    staging, store = (lane.req_to_blocks for lane in scheduler.lanes)
    seen = observe(scheduler)

    staging["a"], store["a"] = [BLOCK] * 4, [BLOCK] * 2
    scheduler.schedule({"a": 100})
    staging["a"] = [NULL, NULL, NULL, BLOCK]
    scheduler.schedule({"a": 1})

    figures = seen.figures(100)
    assert figures["blocks"] == {"peak": 6.0, "steady": 3.0, "pool": 100, "least_free": 90}
    # One at its peak of 6, the others at 3: 1 + 94 // 3.
    assert figures["requests_at_once"] == {"seen": 1, "in_pool": 32, "preemptions": 0}


def test_a_request_that_ends_before_its_blocks_come_back_does_not_count_for_the_others():
    scheduler = Scheduler()
    seen = observe(scheduler)
    for name, held in (("a", 3), ("b", 40), ("c", 3)):
        scheduler.add(name, 100)
        scheduler.lanes[0].req_to_blocks[name] = [BLOCK] * held
    scheduler.schedule({"a": 1, "b": 1, "c": 1})

    figures = seen.figures(100)

    assert figures["blocks"]["steady"] == 3
    assert figures["requests_at_once"]["in_pool"] == 21


def test_a_step_with_any_prompt_token_is_prefill():
    scheduler = Scheduler()
    scheduler.add("a", 10)
    scheduler.add("b", 30)
    for lane in scheduler.lanes:
        lane.req_to_blocks = {"a": [BLOCK], "b": [BLOCK]}
    seen = observe(scheduler)

    for tokens in ({"a": 10, "b": 5}, {"a": 1, "b": 25}, {"a": 1, "b": 1}, {}):
        seen.time_step(lambda tokens=tokens: scheduler.schedule(tokens))

    assert (seen.prefill_tokens, seen.decode_steps, seen.decode_tokens) == (40, 1, 2)
    assert seen.prefill_seconds > 0
    assert seen.decode_seconds > 0
    assert seen.running == 2
