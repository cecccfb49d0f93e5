"""A hand-written fine-tuning loop: QLoRA under DeepSpeed ZeRO-3, from dialogues to SOAP notes."""
