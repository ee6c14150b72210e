"""Architectures that read sounds or time series."""

from functools import partial

from .batches import forecast, spectrogram_classification, spectrogram_to_text, speech_recognition, waveform
from .kinds import LAYERS, Architecture, bart, custom, patches, series, speech, vit

FAMILIES: dict[str, dict[str, Architecture]] = {
    "audio": {
        "wav2vec2": speech("Wav2Vec2ForCTC"),
        "hubert": speech("HubertForCTC"),
        "wavlm": speech("WavLMForCTC"),
        "unispeech": speech("UniSpeechForCTC"),
        "data2vec-audio": speech("Data2VecAudioForCTC", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
        "sew": speech("SEWForCTC"),
        "whisper": bart(
            "WhisperForConditionalGeneration",
            partial(spectrogram_to_text, 8, 20),
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
        ),
        "speech_to_text": bart(
            "Speech2TextForConditionalGeneration",
            partial(spectrogram_to_text, 20, 8),
            input_feat_per_channel=8,
            conv_channels=16,
            max_source_positions=64,
            max_target_positions=16,
        ),
        "moonshine": bart(
            "MoonshineForConditionalGeneration",
            partial(speech_recognition, 2000),
            **LAYERS,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
        ),
        "audio-spectrogram-transformer": vit(
            "ASTForAudioClassification", spectrogram_classification, max_length=24, num_mel_bins=16
        ),
        "encodec": custom(
            "EncodecModel",
            waveform,
            num_filters=4,
            hidden_size=16,
            upsampling_ratios=[4, 2],
            codebook_size=16,
            sampling_rate=800,
            target_bandwidths=[1.5],
        ),
    },
    "time series": {
        "time_series_transformer": series("TimeSeriesTransformerForPrediction"),
        "autoformer": series("AutoformerForPrediction", label_length=4, moving_average=3),
        "informer": series("InformerForPrediction"),
        "patchtst": patches("PatchTSTForPrediction", num_hidden_layers=2, ffn_dim=48),
        "patchtsmixer": patches("PatchTSMixerForPrediction", num_layers=2),
        "timesfm": custom(
            "TimesFmModelForPrediction", forecast, **LAYERS, head_dim=8, patch_length=4, context_length=16, horizon_length=4
        ),
    },
}
