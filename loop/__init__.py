"""A hand-written fine-tuning loop: QLoRA under DeepSpeed ZeRO-3, from doctor-patient dialogues to SOAP notes."""
