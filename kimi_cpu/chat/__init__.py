"""Conversations: from OpenAI-form messages to token ids, and from token ids back to messages."""
