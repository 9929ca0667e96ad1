"""Routes of the My Models page."""

from __future__ import annotations

from django.urls import path

from models_app import model_page, upload_views, views

urlpatterns = [
    path("", views.my_models, name="my-models"),
    path("list", views.model_list, name="model-list"),
    path("<int:model_id>/load", views.load, name="model-load"),
    path("<int:model_id>/load-options", views.load_options, name="model-load-options"),
    path("<int:model_id>/estimate", views.estimate, name="model-estimate"),
    path("<int:model_id>/", model_page.show, name="model"),
    path("<int:model_id>/load-defaults", model_page.load_defaults, name="model-load-defaults"),
    path("<int:model_id>/inference-defaults", model_page.inference_defaults, name="model-inference-defaults"),
    path("<int:model_id>/verification", model_page.verification, name="model-verification"),
    path("<int:model_id>/template", model_page.template, name="model-template"),
    path("<int:model_id>/delete", views.delete, name="model-delete"),
    path("scan", views.scan_folder, name="model-scan"),
    path("import-path", views.import_path, name="model-import-path"),
    path("virtual", views.add_virtual, name="model-add-virtual"),
    path("instances/<int:instance_id>/pin", views.pin, name="instance-pin"),
    path("instances/<int:instance_id>/unload", views.unload, name="instance-unload"),
    path("uploads", upload_views.new_upload, name="uploads"),
    path("uploads/<str:upload_id>", upload_views.upload, name="upload"),
    path("uploads/<str:upload_id>/finish", upload_views.finish_upload, name="upload-finish"),
]
