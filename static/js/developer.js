// The Developer page: the dialog closes when its token exists, and the new secret is what a reader meets next.

document.addEventListener("token-created", () => {
  document.getElementById("token-dialog").close();
  document.getElementById("new-secret").focus();
});
